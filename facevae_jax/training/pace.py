"""When a run logs, evaluates and saves, how long a dispatch is, and the figures in between."""

import math
from typing import NamedTuple

import jax
import numpy as np

from facevae_jax.config import RunConfig
from facevae_jax.data.plan import steps_per_epoch
from facevae_jax.training.step import Metrics

DISPATCH_SECONDS = 3.0  # aimed at: long enough to hide what a dispatch costs, short enough to answer a signal


class Schedule(NamedTuple):
    """When things happen, in optimiser steps."""

    total: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, config: RunConfig, *, images: int) -> "Schedule":
        """The schedule of a run on so many training images."""
        train = config.train
        epoch = steps_per_epoch(images, train.batch_size)
        evaluate = epoch * train.evaluate_every_epochs
        total = train.steps or epoch * train.epochs
        return cls(total, train.log_every_steps, evaluate, train.checkpoint_every_steps or evaluate)

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return step > 0 and (step % self.evaluate_every == 0 or step == self.total)

    def next_boundary(self, step: int) -> int:
        """The next step after `step` at which something other than training happens."""
        cadences = (self.log_every, self.evaluate_every, self.checkpoint_every)
        return min(self.total, *((step // every + 1) * every for every in cadences))


class Window:
    """Metrics since the last log line; they stay on the device until then."""

    def __init__(self) -> None:
        self._parts: list[tuple[Metrics, int]] = []
        self._seconds = 0.0

    def add(self, metrics: Metrics, count: int, seconds: float) -> None:
        """Adds a dispatch of `count` steps that took `seconds`."""
        self._parts.append((metrics, count))
        self._seconds += seconds

    def fetch(self, batch_size: int) -> dict[str, float]:
        """Means over the window's steps that were not skipped, how many were, and images/s; empties it."""
        fetched = [(jax.device_get(metrics), count) for metrics, count in self._parts]
        skipped = np.concatenate([metrics.skipped[:count] for metrics, count in fetched])
        steps = len(skipped)
        flat = [{**metrics.loss._asdict(), "gradient_norm": metrics.gradient_norm} for metrics, _ in fetched]
        values = {}
        for name in flat[0]:
            all_steps = np.concatenate([part[name][:count] for part, (_, count) in zip(flat, fetched, strict=True)])
            learned = all_steps[skipped == 0]
            values[name] = float(learned.mean(dtype=np.float64)) if len(learned) else math.nan
        values["skipped"] = int(skipped.sum())
        values["images_per_second"] = steps * batch_size / self._seconds
        self._parts, self._seconds = [], 0.0
        return values


def dispatch_length(seconds_per_step: float, capacity: int) -> int:
    """Steps of the next dispatch: one to begin with, then as many as last about `DISPATCH_SECONDS`."""
    if not seconds_per_step:
        return 1
    return max(1, min(capacity, round(DISPATCH_SECONDS / seconds_per_step)))
