import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facevae_jax.data.batches import (
    BatchPlan,
    ResidentFeed,
    StreamedFeed,
    batch_reader,
    batch_rows,
    evaluation_rows,
)
from facevae_jax.training.sharding import make_mesh, replicated, split_along

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
PLAN = BatchPlan(seed=3, images=50, batch_size=16)


@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_sees_no_row_twice(images, data, seed, epoch):
    batch_size = data.draw(st.integers(1, images))
    steps = images // batch_size
    rows = [batch_rows(seed=seed, step=epoch * steps + i, images=images, batch_size=batch_size) for i in range(steps)]
    assert all(len(batch) == batch_size for batch in rows)
    seen = np.concatenate(rows)
    assert len(set(seen.tolist())) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < images


def test_epochs_and_seeds_differ_and_calls_do_not():
    def rows(seed, step):
        return batch_rows(seed=seed, step=step, images=50, batch_size=50).tolist()

    assert rows(0, 7) == rows(0, 7)
    assert rows(0, 7) != rows(0, 8)
    assert rows(0, 7) != rows(1, 7)
    assert rows(0, 0) != sorted(rows(0, 0))


def test_rows_do_not_drift():
    """A resumed run must see what the interrupted one would have: this order is part of the checkpoint's meaning."""
    assert batch_rows(seed=0, step=5, images=10, batch_size=4).tolist() == [6, 9, 8, 5]


def feeds(first_step, capacity=4):
    mesh = make_mesh()
    resident = ResidentFeed(
        PIXELS, PLAN, capacity=capacity, pixels_sharding=replicated(mesh), rows_sharding=split_along(mesh, 1)
    )
    streamed = StreamedFeed(PIXELS, PLAN, capacity=capacity, first_step=first_step, batch_sharding=split_along(mesh, 0))
    return resident, streamed


def test_resident_and_streamed_feeds_give_the_same_batches():
    get = jax.jit(lambda chunk, index: batch_reader(chunk)(index))
    resident, streamed = feeds(first_step=5)
    try:
        for step, count in [(5, 4), (9, 1), (10, 3), (13, 4)]:
            chunks = [feed.chunk(step, count) for feed in (resident, streamed)]
            for index in range(count):
                expected = PIXELS[PLAN.rows(step + index)]
                for chunk in chunks:
                    images = get(chunk, index)
                    np.testing.assert_array_equal(images, expected)
                    assert len(images.sharding.device_set) == 8
    finally:
        streamed.close()


def test_chunks_are_as_announced():
    for feed in feeds(first_step=0):
        chunk, announced = feed.chunk(0, 2), feed.abstract_chunk()
        for actual, expected in zip(jax.tree.leaves(chunk), jax.tree.leaves(announced), strict=True):
            assert (actual.shape, actual.dtype, actual.sharding) == (expected.shape, expected.dtype, expected.sharding)
        feed.close()


def test_a_fault_in_the_prefetch_thread_reaches_the_caller():
    class Broken:
        shape = PIXELS.shape

        def __getitem__(self, rows):
            raise OSError("the disk is gone")

    mesh = make_mesh()
    feed = StreamedFeed(Broken(), PLAN, capacity=2, first_step=0, batch_sharding=split_along(mesh, 0))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the disk is gone"):
        feed.chunk(0, 1)
    feed.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


@given(images=st.integers(1, 60), batch_size=st.integers(1, 20))
def test_evaluation_sees_every_row_once(images, batch_size):
    seen = []
    for rows, valid in evaluation_rows(images=images, batch_size=batch_size):
        assert len(rows) == len(valid) == batch_size
        assert rows.max() < images
        seen += rows[valid].tolist()
    assert seen == list(range(images))
