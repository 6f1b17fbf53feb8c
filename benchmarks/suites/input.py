"""The feeds alone: how fast batches reach the device."""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.suites.options import Options
from benchmarks.suites.timing import Case, image_rates, rates
from benchmarks.suites.training import random_pixels
from facevae_jax.data.batches import PREFETCHED_CHUNKS, Feed, ResidentFeed, StreamedFeed
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.sharding import make_mesh, replicated, split_along


def run(options: Options) -> dict[str, Any]:
    """Asks both feeds for chunk after chunk of a store of random pixels and does nothing with them."""
    config, mesh = options.config, make_mesh()
    batch_size, capacity = config.train.batch_size, config.train.steps_per_dispatch
    plan = BatchPlan(config.train.seed, max(options.images, batch_size), batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "pixels.npy")
        np.save(path, random_pixels(plan.images, config.data.resolution))
        pixels = np.load(path, mmap_mode="r")
        rows = split_along(mesh, 1)
        resident = ResidentFeed(pixels, plan, capacity=capacity, pixels_sharding=replicated(mesh), rows_sharding=rows)
        streamed = StreamedFeed(
            pixels, plan, capacity=capacity, first=0, batch_sharding=split_along(mesh, 0), rows_sharding=rows
        )
        try:
            cases = {
                "resident": feed_case(resident, batch_size=batch_size, ahead=0),
                "streamed": feed_case(streamed, batch_size=batch_size, ahead=PREFETCHED_CHUNKS),
            }
            values = rates(cases, rounds=options.rounds, seconds=options.seconds)
        finally:
            resident.close()
            streamed.close()
    return {
        "what": f"batches of {batch_size} at {config.data.resolution}x{config.data.resolution} on the device: row "
        "numbers alone (resident), or pixels gathered from a memory-mapped file in the page cache (streamed)",
        **image_rates(values),
        "batches_per_chunk": {"resident": resident.capacity, "streamed": streamed.capacity},
        "images_in_store": plan.images,
    }


def feed_case(feed: Feed, *, batch_size: int, ahead: int) -> Case:
    """Full chunks of a feed, one after the other, each waited for until it is on the device.

    Args:
      feed: at step 0.
      batch_size: of its plan.
      ahead: chunks that the feed gathers while nobody asks; they are taken before the clock starts.
    """
    step = 0

    def take() -> None:
        nonlocal step
        jax.block_until_ready(feed.chunk(step, feed.capacity))
        step += feed.capacity

    def run(count: int) -> float:
        for _ in range(ahead):
            take()
        started = time.perf_counter()
        for _ in range(count):
            take()
        return time.perf_counter() - started

    return Case(run, feed.capacity * batch_size)
