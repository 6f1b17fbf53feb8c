"""What the suites share: timed training steps on one fixed batch, turns, random pixels."""

import contextlib
import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from facevae_jax.config import CHANNELS, RunConfig
from facevae_jax.data.batches import Chunk
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import create_state, make_model, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps

CALIBRATION = 0.2  # of a timing's seconds: how long a stretch must last before a step's time is read off it
SCHEDULED_STEPS = 1000  # of the learning rate; it does not change the speed


def random_pixels(images: int, resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    """Uniformly random pixels: the speed does not depend on what is seen, and drawing faces would take longer."""
    shape = (images, resolution, resolution, CHANNELS)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


class Steps:
    """Training steps of a config on one fixed batch in device memory, many in a dispatch."""

    def __init__(self, config: RunConfig) -> None:
        """Compiles, and runs one step; `first_seconds` is what that step took."""
        train = config.train
        mesh = make_mesh()
        trainer = Trainer(config, make_model(config), make_optimizer(train, total_steps=SCHEDULED_STEPS))
        self.batch_size, self._capacity = train.batch_size, train.steps_per_dispatch
        self._state = create_state(config, trainer.model, trainer.optimizer, mesh)
        pixels = jax.device_put(random_pixels(train.batch_size, config.data.resolution), replicated(mesh))
        rows = np.tile(np.arange(train.batch_size, dtype=np.int32), (self._capacity, 1))
        self._chunk = Chunk(pixels, jax.device_put(rows, split_along(mesh, 1)))
        self._compiled = compile_train_steps(trainer, self._state, self._chunk, capacity=self._capacity)
        self.first_seconds = self.run(1)
        self.seconds_per_step = 0.0  # of the last timing

    def run(self, steps: int) -> float:
        """Seconds that so many steps took."""
        started = time.perf_counter()
        for first in range(0, steps, self._capacity):
            self._state, _ = self._compiled(self._state, self._chunk, np.int32(min(self._capacity, steps - first)))
        jax.block_until_ready(self._state)
        return time.perf_counter() - started

    def rate(self, seconds: float) -> float:
        """Images per second over about `seconds`, which are at least one step."""
        if not self.seconds_per_step:
            self.seconds_per_step = time_per_call(self.run, seconds=CALIBRATION * seconds)
        steps = max(1, round(seconds / self.seconds_per_step))
        self.seconds_per_step = self.run(steps) / steps
        return self.batch_size / self.seconds_per_step


def time_per_call(run: Callable[[int], float], *, seconds: float) -> float:
    """Seconds of one call, from a stretch of calls of at least `seconds`; `run` gives the seconds of n calls."""
    calls = 1
    while (taken := run(calls)) < seconds:
        calls *= 4
    return taken / calls


def take_turns(cases: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """What every case gives in every round; one after the other, so that a change in the load meets all of them."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            values[name].append(case())
    return values


def summary(name: str, values: list[float]) -> dict[str, Any]:
    """{name: median, name_all: values}."""
    return {name: statistics.median(values), f"{name}_all": values}


def describe(config: RunConfig) -> dict[str, Any]:
    """The settings of a config that decide its speed, for the record."""
    return {
        "resolution": config.data.resolution,
        "batch_size": config.train.batch_size,
        "steps_per_dispatch": config.train.steps_per_dispatch,
        "model": dataclasses.asdict(config.model),
    }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what the measured code prints off the screen, where the tables are."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
