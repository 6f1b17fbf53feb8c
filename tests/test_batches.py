import pathlib
import re
import threading

import jax
import numpy as np
import pytest

from facevae_jax.data.batches import batch_reader
from facevae_jax.data.feed import Feed, ResidentFeed, StreamedFeed, gather_rows
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.setup import make_mesh, replicated, split_along

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
PLAN = BatchPlan(seed=3, images=50, batch_size=16)


def streamed_feed(pixels=PIXELS, *, capacity=4, first=0) -> StreamedFeed:
    mesh = make_mesh()
    shardings = {"batch_sharding": split_along(mesh, 0), "rows_sharding": split_along(mesh, 1)}
    return StreamedFeed(pixels, PLAN, capacity=capacity, first=first, **shardings)


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

    feed = streamed_feed(PIXELS.view(Broken), capacity=2)
    with pytest.raises(OSError, match="the disk is gone"):
        feed.chunk(0, 1)
    feed.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
