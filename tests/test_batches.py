"""All feeds give the same batches, and a batch is augmented in the same way on any number of devices."""

import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facevae_jax.data.batches import Batch, batch_reader, dequantize, random_flip, row_keys
from facevae_jax.data.exchange import make_routes, send_capacity
from facevae_jax.data.feed import Feed, FeedSpec, Kind, ResidentFeed, StreamedFeed, gather_rows
from facevae_jax.data.plan import PADDING, BatchPlan, padded_rows
from facevae_jax.training.setup import make_mesh, split_along

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
PLAN = BatchPlan(seed=3, images=50, batch_size=16)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 4, 6, 3), np.uint8)
ROWS = np.arange(100, 164, dtype=np.int32)


def spec_of(kind: Kind, *, plan=PLAN, devices=8, parts=1) -> FeedSpec:
    return FeedSpec.of(kind, plan, PIXELS.shape[1:], make_mesh(jax.devices()[:devices]), capacity=4, parts=parts)


def streamed_feed(pixels=PIXELS, *, first=0, **given) -> StreamedFeed:
    return StreamedFeed(pixels, spec_of("streamed", **given), first=first)


def feeds(first, **given) -> dict[str, Feed]:
    return {
        "resident": ResidentFeed(PIXELS, spec_of("resident", **given)),
        "sharded": ResidentFeed(PIXELS, spec_of("sharded", **given)),
        "streamed": streamed_feed(first=first, **given),
    }


def reader(mesh):
    def read(chunk, index):
        images, rows = batch_reader(chunk, mesh=mesh)(index)
        return Batch(images.reshape(-1, *PIXELS.shape[1:]), rows)

    return jax.jit(read)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_all_feeds_give_the_same_batches(devices):
    opened = feeds(first=5, devices=devices)
    get = reader(opened["resident"].spec.mesh)
    try:
        for step, count in [(5, 4), (9, 1), (10, 3), (13, 4)]:
            for feed in opened.values():
                chunk = feed.chunk(step, count)
                for index in range(count):
                    batch = get(chunk, index)
                    rows = PLAN.rows(step + index)[0]
                    np.testing.assert_array_equal(batch.rows, rows)
                    np.testing.assert_array_equal(batch.images, PIXELS[rows])
                    assert len(chunk.rows.sharding.device_set) == devices
    finally:
        opened["streamed"].close()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_that_devices_do_not_divide_is_filled_up(parts):
    """15 rows on 4 devices: 16, or 3 parts of 5 rows and 3 of padding."""
    plan = BatchPlan(seed=3, images=50, batch_size=15)
    opened = feeds(first=0, plan=plan, devices=4, parts=parts)
    get = reader(opened["resident"].spec.mesh)
    for feed in opened.values():
        batch = get(feed.chunk(0, 1), 0)
        rows, images = np.asarray(batch.rows), np.asarray(batch.images)
        real = rows != PADDING
        assert len(rows) == {1: 16, 3: 24}[parts]
        np.testing.assert_array_equal(rows[real], plan.rows(0)[0])
        np.testing.assert_array_equal(images[real], PIXELS[rows[real]])
        assert (real.reshape(-1, parts).sum(axis=0) == 15 // parts).all()  # no part has more than another
        feed.close()


def test_each_device_holds_its_slice_and_never_the_split():
    """50 images on 8 devices: 7 on each, of which the last has one."""
    chunk = ResidentFeed(PIXELS, spec_of("sharded")).chunk(0, 1)
    shards = chunk.pixels.addressable_shards
    assert {shard.data.shape[0] for shard in shards} == {7}
    held = np.concatenate([shard.data for shard in shards])[:50]
    np.testing.assert_array_equal(held.reshape(PIXELS.shape), PIXELS)


def test_a_batch_that_is_half_padding_has_room():
    """65 rows on 64 devices: 63 of padding, which no device sends to another."""
    rows = padded_rows(np.arange(0, 6500, 100)[None], parts=1, devices=64)
    runs = make_routes(rows, devices=64, slice_size=110).runs
    between = runs[0, :, 1] * (1 - np.eye(64, dtype=int))
    assert rows.shape == (1, 128)
    assert between.sum() <= 65


def test_a_device_sends_what_the_others_need_and_no_more():
    """The runs that peers announce to each other agree, and the images sent are those of the batch, once each."""
    rows = np.stack([np.random.default_rng(step).permutation(4000)[:256] for step in range(3)])
    send, runs, place = make_routes(rows, devices=8, slice_size=500)
    starts, sizes, arrivals, arriving = np.moveaxis(runs, 2, 0)
    np.testing.assert_array_equal(sizes, arriving.swapaxes(1, 2))
    assert (sizes.sum(axis=1) == 32).all()  # each device gets its share
    assert sizes.sum(axis=2).max() <= send.shape[2] == send_capacity(32)
    for step in range(3):
        received = np.full((8, 32), -1)
        for source, target in np.ndindex(8, 8):
            run = slice(starts[step, source, target], starts[step, source, target] + sizes[step, source, target])
            at = arrivals[step, source, target]
            received[target, at : at + sizes[step, source, target]] = source * 500 + send[step, source, run]
        by_device = np.take_along_axis(received, place[step].reshape(8, 32), axis=1)
        np.testing.assert_array_equal(by_device.ravel(), rows[step])


def test_chunks_are_as_announced():
    for feed in feeds(first=0).values():
        chunk, announced = feed.chunk(0, 2), feed.spec.abstract_chunk()
        for actual, expected in zip(jax.tree.leaves(chunk), jax.tree.leaves(announced), strict=True):
            assert (actual.shape, actual.dtype, actual.sharding) == (expected.shape, expected.dtype, expected.sharding)
        feed.close()


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="Linux tells how much of a file is mapped")
def test_reading_a_store_leaves_none_of_it_mapped(tmp_path):
    path = tmp_path / "train.npy"
    np.save(path, np.full((500, 64, 64, 3), 7, np.uint8))  # 6 MB

    def resident_kilobytes() -> int:
        entry = pathlib.Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(re.search(r"Rss:\s+(\d+) kB", entry).group(1))

    pixels = np.load(path, mmap_mode="r")
    assert (pixels[::2].sum(), resident_kilobytes() > 3000) == (250 * 64 * 64 * 3 * 7, True)
    assert (gather_rows(pixels, np.array([3, 499])) == 7).all()
    assert resident_kilobytes() < 100


def test_a_fault_in_the_prefetch_thread_reaches_the_caller():
    class Broken(np.ndarray):
        def __getitem__(self, rows):
            raise OSError("the disk is gone")

    feed = streamed_feed(PIXELS.view(Broken))
    with pytest.raises(OSError, match="the disk is gone"):
        feed.chunk(0, 1)
    feed.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def flipped(images, rows, *, seed=0, step=0):
    (keys,) = row_keys(jnp.asarray(rows), "flip", seed=seed, step=step)
    return np.asarray(random_flip(jnp.asarray(images), keys))


def dequantized(images, rows, *, seed=0, stream="a", step=0):
    # Whatever other stream is asked for with it.
    _, keys = row_keys(jnp.asarray(rows), "other", stream, seed=seed, step=step)
    return np.asarray(dequantize(jnp.asarray(images), keys))


def is_flipped(rows, **keys):
    """Of images that are not their own mirror image."""
    images = IMAGES[np.asarray(rows) % 64]
    result = flipped(images, rows, **keys)
    mirrored = np.array([(after == before[:, ::-1]).all() for after, before in zip(result, images, strict=True)])
    kept = np.array([(after == before).all() for after, before in zip(result, images, strict=True)])
    assert (mirrored != kept).all()
    return mirrored


def test_half_of_the_images_are_mirrored_left_to_right():
    rows = np.arange(4096, dtype=np.int32)
    assert abs(is_flipped(rows).mean() - 0.5) < 0.03  # four standard errors


def test_what_happens_to_a_row_depends_on_seed_step_and_row_alone():
    expected = is_flipped(ROWS)
    shuffled = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(is_flipped(ROWS[shuffled]), expected[shuffled])
    np.testing.assert_array_equal(is_flipped(ROWS[10:20]), expected[10:20])
    for other in ({"seed": 1}, {"step": 1}):
        assert 10 < (is_flipped(ROWS, **other) != expected).sum() < 54
    noise = dequantized(IMAGES, ROWS, step=3)
    part = dequantized(IMAGES[shuffled[:5]], ROWS[shuffled[:5]], step=3)
    np.testing.assert_array_equal(part, noise[shuffled[:5]])
    for other in ({"seed": 1}, {"step": 4}, {"stream": "b"}):
        assert (dequantized(IMAGES, ROWS, **{"step": 3} | other) != noise).mean() > 0.99


def test_noise_is_uniform_over_the_gray_level():
    levels = np.array([0, 128, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (3, 100, 100, 3))
    values = dequantized(images, ROWS[:3]) * 256 - levels[:, None, None, None]
    assert values.min() >= 0
    assert values.max() <= 1
    for noise in values:
        counts = np.histogram(noise, bins=10, range=(0, 1))[0]
        assert (abs(counts - 3000) < 4 * 3000**0.5).all()
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 4 / 30_000**0.5


def test_devices_change_nothing():
    images, rows = jax.device_put((jnp.asarray(IMAGES), jnp.asarray(ROWS)), split_along(make_mesh(), 0))
    flips, noise = jax.jit(lambda rows: row_keys(rows, "flip", "a", seed=0, step=0))(rows)
    np.testing.assert_array_equal(jax.jit(random_flip)(images, flips), flipped(IMAGES, ROWS))
    np.testing.assert_array_equal(jax.jit(dequantize)(images, noise), dequantized(IMAGES, ROWS))
