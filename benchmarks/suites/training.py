"""Training steps on one fixed batch that lives in device memory: the step alone, without feed, log or evaluation."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from benchmarks.suites.timing import Case
from facevae_jax.config import CHANNELS, RunConfig
from facevae_jax.data.batches import Chunk
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import abstract_state, create_state, make_model, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps

# The schedule's length, which decides the learning rate and nothing about the speed.
TOTAL_STEPS = 1000


def make_trainer(config: RunConfig) -> Trainer:
    """The trainer of a run with this config."""
    return Trainer(config, make_model(config), make_optimizer(config.train, total_steps=TOTAL_STEPS))


def with_size(config: RunConfig, *, resolution: int, batch_size: int, latent_dim: int) -> RunConfig:
    """The config with other sizes."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, resolution=resolution),
        model=dataclasses.replace(config.model, latent_dim=latent_dim),
        train=dataclasses.replace(config.train, batch_size=batch_size),
    )


def random_pixels(images: int, resolution: int) -> np.ndarray:
    """Uniformly random uint8 pixels [images, resolution, resolution, 3]: the speed does not depend on them."""
    return np.random.default_rng(0).integers(0, 256, (images, resolution, resolution, CHANNELS), np.uint8)


def abstract(shape: tuple[int, ...], dtype: type, sharding: Sharding) -> Any:
    """Stands for an array in compilation."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class FixedBatch:
    """The compiled program of `train_steps`, as many steps in one dispatch as the config allows."""

    def __init__(self, config: RunConfig) -> None:
        """Compiles; `start` then makes the arrays."""
        train, resolution = config.train, config.data.resolution
        self._config, self._mesh, self._trainer = config, make_mesh(), make_trainer(config)
        pixels = (train.batch_size, resolution, resolution, CHANNELS)
        rows = (train.steps_per_dispatch, train.batch_size)
        chunk = Chunk(
            abstract(pixels, np.uint8, replicated(self._mesh)), abstract(rows, np.int32, split_along(self._mesh, 1))
        )
        state = abstract_state(config, self._trainer.model, self._trainer.optimizer, self._mesh)
        self._compiled = compile_train_steps(self._trainer, state, chunk, capacity=train.steps_per_dispatch)

    @property
    def bytes_needed(self) -> int:
        """Memory that the program takes on one device, as far as the compiler knows."""
        memory = self._compiled.memory_analysis()
        return sum(getattr(memory, f"{kind}_size_in_bytes", 0) for kind in ("argument", "temp"))

    def start(self) -> Case:
        """The case, one step a time; its units are images."""
        config, mesh, capacity = self._config, self._mesh, self._config.train.steps_per_dispatch
        batch_size = config.train.batch_size
        rows = np.tile(np.arange(batch_size, dtype=np.int32), (capacity, 1))
        pixels = random_pixels(batch_size, config.data.resolution)
        chunk = Chunk(jax.device_put(pixels, replicated(mesh)), jax.device_put(rows, split_along(mesh, 1)))
        state = create_state(config, self._trainer.model, self._trainer.optimizer, mesh)

        def run(steps: int) -> float:
            nonlocal state
            started = time.perf_counter()
            for first in range(0, steps, capacity):
                state, _ = self._compiled(state, chunk, np.int32(min(capacity, steps - first)))
            jax.block_until_ready(state)
            return time.perf_counter() - started

        return Case(run, batch_size)
