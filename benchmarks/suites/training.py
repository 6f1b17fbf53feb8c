"""Training steps on one fixed batch in device memory: the step alone, without feed, log or evaluation."""

import contextlib
import dataclasses
import functools
import io
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from benchmarks.suites.timing import Case
from facevae_jax.config import RunConfig
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.batches import Batch
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.feed import FeedSpec, ResidentFeed
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.setup import TrainSetup, abstract_state, create_state, make_mesh
from facevae_jax.training.step import compile_train_steps, train_step


def on_drawn_faces(config: RunConfig, *, data_dir: str, train: int, validation: int, **settings: Any) -> RunConfig:
    """The config on so many drawn faces, which are drawn now, with some settings of `train` changed."""
    sizes = {"synthetic_train_images": train, "synthetic_validation_images": validation}
    data = dataclasses.replace(config.data, name="synthetic", data_dir=data_dir, **sizes)
    with contextlib.redirect_stdout(io.StringIO()):
        for split in (dataset := open_dataset(data)).sizes:
            dataset.images(split)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, **settings))


def random_pixels(images: int, resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    """Uniformly random pixels: the speed does not depend on them."""
    return np.random.default_rng(0).integers(0, 256, (images, resolution, resolution, CHANNELS), np.uint8)


def arithmetic(config: RunConfig) -> float:
    """Floating-point operations of one step, as XLA counts them for plain convolutions: products with padding are none.

    XLA counts a loop's body once, so it is wrong for networks with loops, such as hierarchies.
    """
    train = dataclasses.replace(config.train, convolution="plain", accumulation=1)
    plain = dataclasses.replace(config, train=train)
    setup = TrainSetup.of(plain, make_mesh(jax.devices()[:1]))
    rows = jax.ShapeDtypeStruct((config.train.batch_size,), jnp.int32)
    size = config.data.resolution
    batch = Batch(jax.ShapeDtypeStruct((*rows.shape, size, size, CHANNELS), jnp.uint8), rows)
    step = jax.jit(functools.partial(train_step, setup=setup))
    return float(step.lower(abstract_state(setup), batch).cost_analysis()["flops"])


class FixedBatch:
    """The compiled program of `train_steps`, with as many steps in one dispatch as the config allows."""

    def __init__(self, config: RunConfig) -> None:
        """Compiles it."""
        train, size, mesh = config.train, config.data.resolution, make_mesh()
        self._setup = TrainSetup.of(config, mesh)
        plan = BatchPlan(train.seed, train.batch_size, train.batch_size)
        shape, parts = (size, size, CHANNELS), train.accumulation
        self._spec = FeedSpec.of("resident", plan, shape, mesh, capacity=train.steps_per_dispatch, parts=parts)
        state = abstract_state(self._setup)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self._compiled = compile_train_steps(self._setup, state, self._spec)

    @property
    def temporary_bytes(self) -> int:
        """Device memory that a step needs beside its arguments."""
        return int(getattr(self._compiled.memory_analysis(), "temp_size_in_bytes", 0))

    def start(self, pixels: UInt8[np.ndarray, "b r r 3"] | None = None) -> Case:
        """The case of one step, in images, on these pixels or on random ones.

        Raises:
          FloatingPointError: when it is run, if the loss is not finite.
        """
        config = self._setup.config
        batch_size, capacity = config.train.batch_size, self._spec.capacity
        pixels = random_pixels(batch_size, config.data.resolution) if pixels is None else pixels
        chunk = ResidentFeed(pixels, self._spec).chunk(0, capacity)
        state = create_state(self._setup)

        def run(steps: int) -> float:
            nonlocal state
            started = time.perf_counter()
            for first in range(0, steps, capacity):
                count = min(capacity, steps - first)
                state, metrics = self._compiled(state, chunk, np.int32(count))
            jax.block_until_ready(state)
            seconds = time.perf_counter() - started
            if not np.isfinite(loss := metrics.loss.loss[count - 1]):
                raise FloatingPointError(f"the loss became {loss}")
            return seconds

        return Case(run, batch_size)
