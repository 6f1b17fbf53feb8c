"""All feeds give the same batches, and a batch is augmented in the same way on any number of devices."""

import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facevae_jax.data.batches import Batch, batch_reader, dequantize, random_flip
from facevae_jax.data.feed import Feed, ResidentFeed, StreamedFeed, gather_rows
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.setup import make_mesh, replicated, split_along

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
PLAN = BatchPlan(seed=3, images=50, batch_size=16)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 4, 6, 3), np.uint8)
ROWS = np.arange(100, 164, dtype=np.int32)


def streamed_feed(pixels=PIXELS, *, first=0) -> StreamedFeed:
    mesh = make_mesh()
    shardings = {"batch_sharding": split_along(mesh, 0), "rows_sharding": split_along(mesh, 1)}
    return StreamedFeed(pixels, PLAN, capacity=4, first=first, **shardings)


def feeds(first) -> dict[str, Feed]:
    mesh = make_mesh()
    rows = split_along(mesh, 1)
    return {
        "resident": ResidentFeed(PIXELS, PLAN, capacity=4, pixels_sharding=replicated(mesh), rows_sharding=rows),
        "sharded": ResidentFeed(PIXELS, PLAN, capacity=4, pixels_sharding=split_along(mesh, 0), rows_sharding=rows),
        "streamed": streamed_feed(first=first),
    }


def test_all_feeds_give_the_same_batches():
    get = jax.jit(lambda chunk, index: batch_reader(chunk)(index))
    opened = feeds(first=5)
    try:
        for step, count in [(5, 4), (9, 1), (10, 3), (13, 4)]:
            for feed in opened.values():
                chunk = feed.chunk(step, count)
                for index in range(count):
                    batch = get(chunk, index)
                    rows = PLAN.rows(step + index)[0]
                    np.testing.assert_array_equal(batch.rows, rows)
                    np.testing.assert_array_equal(batch.images, PIXELS[rows])
                    assert len(chunk.rows.sharding.device_set) == 8
    finally:
        opened["streamed"].close()


def test_each_device_holds_its_slice_and_never_the_split():
    """50 images on 8 devices: 7 on each, of which the last has one; what travels is as large as a batch."""
    sharding = split_along(make_mesh(), 0)
    rows = split_along(make_mesh(), 1)
    chunk = ResidentFeed(PIXELS, PLAN, capacity=4, pixels_sharding=sharding, rows_sharding=rows).chunk(0, 1)
    shards = chunk.pixels.addressable_shards
    assert {shard.data.shape for shard in shards} == {(7, 4, 4, 3)}
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards])[:50], PIXELS)
    program = jax.jit(lambda chunk: batch_reader(chunk)(0).images * 2).lower(chunk).compile().as_text()
    moved = re.findall(r"= u8\[(\d+),4,4,3\]\S* (?:all-|reduce-|collective-)", program)
    assert moved
    assert all(int(images) <= PLAN.batch_size for images in moved)


def test_chunks_are_as_announced():
    for feed in feeds(first=0).values():
        chunk, announced = feed.chunk(0, 2), feed.abstract_chunk()
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
    return np.asarray(random_flip(Batch(jnp.asarray(images), jnp.asarray(rows)), seed=seed, step=step))


def dequantized(images, rows, *, seed=0, stream="a", step=0):
    return np.asarray(dequantize(jnp.asarray(images), jnp.asarray(rows), seed=seed, stream=stream, step=step))


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
    batch = jax.device_put(Batch(jnp.asarray(IMAGES), jnp.asarray(ROWS)), split_along(make_mesh(), 0))
    np.testing.assert_array_equal(jax.jit(lambda b: random_flip(b, seed=0, step=0))(batch), flipped(IMAGES, ROWS))
    sharded = jax.jit(lambda b: dequantize(*b, seed=0, stream="a", step=0))(batch)
    np.testing.assert_array_equal(sharded, dequantized(IMAGES, ROWS))
