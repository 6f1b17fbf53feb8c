import collections
import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facevae_jax.data.plan import BatchPlan, evaluation_rows, shuffled_rows


def order(images, *, seed=0, epoch=0):
    return shuffled_rows(np.arange(images), seed=seed, epoch=epoch, images=images)


@settings(max_examples=50, deadline=None)
@given(images=st.integers(1, 500), data=st.data(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_sees_no_row_twice(images, data, seed, epoch):
    batch_size = data.draw(st.integers(1, images))
    steps = images // batch_size
    seen = BatchPlan(seed, images, batch_size).rows(epoch * steps, steps).ravel()
    assert len(set(seen.tolist())) == len(seen) == steps * batch_size
    assert seen.min() >= 0
    assert seen.max() < images
    assert sorted(order(images, seed=seed, epoch=epoch)) == list(range(images))


@settings(deadline=None)
@given(step=st.integers(0, 100), count=st.integers(1, 20))
def test_steps_asked_for_together_are_those_asked_for_alone(step, count):
    plan = BatchPlan(seed=3, images=50, batch_size=16)  # 3 steps an epoch
    alone = np.concatenate([plan.rows(step + i) for i in range(count)])
    np.testing.assert_array_equal(plan.rows(step, count), alone)


def test_rows_do_not_drift():
    """A resumed run must see what the interrupted one would have: this order is part of the checkpoint's meaning."""
    assert BatchPlan(0, 10, 4).rows(5).tolist() == [[0, 1, 8, 3]]
    assert BatchPlan(1, 10, 4).rows(5).tolist() == [[9, 5, 3, 8]]
    assert BatchPlan(7, 10**9, 3).rows(10**10).tolist() == [[683804506, 353971472, 420743554]]


def test_every_order_of_four_is_as_likely():
    epochs = 12_000
    counts = collections.Counter(tuple(order(4, epoch=epoch)) for epoch in range(epochs))
    expected = epochs / 24
    chi_squared = sum((counts[found] - expected) ** 2 / expected for found in itertools.permutations(range(4)))
    assert chi_squared < 49.7  # the 99.9% quantile for 23 degrees of freedom


def test_orders_look_random():
    """Neighbours, fixed points and differences as in uniform permutations, to four standard errors or so."""
    images, epochs = 1000, 200
    orders = np.stack([order(images, epoch=epoch) for epoch in range(epochs)])
    correlations = [np.corrcoef(rows[:-1], rows[1:])[0, 1] for rows in orders]
    assert abs(np.mean(correlations)) < 4 / (images * epochs) ** 0.5
    assert abs(np.std(correlations) * images**0.5 - 1) < 0.2
    assert abs((orders == np.arange(images)).sum(1).mean() - 1) < 4 / epochs**0.5
    differences = np.bincount(np.diff(orders, axis=1).ravel() % images, minlength=images)[1:]
    expected = differences.sum() / (images - 1)
    assert ((differences - expected) ** 2 / expected).sum() / (images - 1) < 1.2


@pytest.mark.parametrize("images", [10**9, 2**31 - 1])
def test_a_step_of_a_huge_split_costs_what_a_step_costs(images):
    """A permutation of 10^9 rows takes 4 GB and half a minute; a step here, a table of the square root's size."""
    plan = BatchPlan(seed=0, images=images, batch_size=150)
    tracemalloc.start()
    started = time.perf_counter()
    rows = np.concatenate([plan.rows(step) for step in range(0, 2**40, 2**34)])
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.min() >= 0
    assert rows.max() > 0.99 * images
    assert len(np.unique(rows)) > 0.99 * rows.size
    assert peak < 20e6
    assert seconds < 20  # 64 epochs' tables


@given(images=st.integers(1, 60), batch_size=st.integers(1, 20))
def test_evaluation_sees_every_row_once(images, batch_size):
    seen = []
    for rows, valid in evaluation_rows(images=images, batch_size=batch_size):
        assert len(rows) == len(valid) == batch_size
        assert rows.max() < images
        seen += rows[valid].tolist()
    assert seen == list(range(images))
