"""The feeds alone: how fast batches reach the device."""

import contextlib
import dataclasses
import io
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.suites.timing import Case, Options, image_rates, rates
from benchmarks.suites.training import random_pixels
from facevae_jax.data.feed import PREFETCHED_CHUNKS, Feed
from facevae_jax.training.feeds import make_feed
from facevae_jax.training.setup import make_mesh

AHEAD = {"resident": 0, "streamed": PREFETCHED_CHUNKS}  # chunks that a feed prefetches


def run(options: Options) -> dict[str, Any]:
    """Requests chunk after chunk of a store of random pixels from both feeds and does nothing with them."""
    config, batch_size = options.config, options.config.train.batch_size
    images = max(options.images, batch_size)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder, "pixels.npy")
        np.save(path, random_pixels(images, config.data.resolution))
        pixels = np.load(path, mmap_mode="r")
        feeds: dict[str, Feed] = {}
        for name in AHEAD:
            data = dataclasses.replace(config.data, feed=name)
            with contextlib.redirect_stdout(io.StringIO()):
                feeds[name] = make_feed(dataclasses.replace(config, data=data), pixels, make_mesh(), first_step=0)
            stack.callback(feeds[name].close)
        cases = {name: feed_case(feed, batch_size=batch_size, ahead=AHEAD[name]) for name, feed in feeds.items()}
        values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    return {
        "what": f"batches of {batch_size} at {config.data.resolution}x{config.data.resolution} on the device: row "
        "numbers alone (resident), or pixels gathered from a memory-mapped file in the page cache (streamed)",
        **image_rates(values),
        "batches_per_chunk": {name: feed.spec.capacity for name, feed in feeds.items()},
        "images_in_store": images,
    }


def feed_case(feed: Feed, *, batch_size: int, ahead: int) -> Case:
    """Full chunks of a feed at step 0, one after the other, each awaited until it is on the device.

    `ahead` is the number of chunks that the feed prefetches; they are taken before the clock starts.
    """
    step = 0

    def take(count: int) -> None:
        nonlocal step
        for _ in range(count):
            jax.block_until_ready(feed.chunk(step, feed.spec.capacity))
            step += feed.spec.capacity

    def run(count: int) -> float:
        take(ahead)
        started = time.perf_counter()
        take(count)
        return time.perf_counter() - started

    return Case(run, feed.spec.capacity * batch_size)
