"""When a run logs, evaluates and saves, how long a dispatch is, and the figures in between."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from facevae_jax import models
from facevae_jax.config import RunConfig, TrainConfig
from facevae_jax.data.plan import steps_per_epoch
from facevae_jax.objective import Loss
from facevae_jax.training.step import Metrics

MAX_UNLEARNED_STEPS = 200  # in a row; by then a norm that is 1,400 times the usual one is taken
DISPATCH_SECONDS = 3.0  # aimed at: long enough to hide what a dispatch costs, short enough to answer a signal


class Schedule(NamedTuple):
    """When things happen, in optimizer steps."""

    total: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    epoch: int

    @classmethod
    def of(cls, config: RunConfig, *, images: int) -> "Schedule":
        """The schedule of a run on so many training images."""
        train = config.train
        epoch = steps_per_epoch(images, train.batch_size)
        evaluate = epoch * train.evaluate_every_epochs
        fitted = models.fit_of(config.model.kind) is not None
        total = 1 if fitted else train.steps or epoch * train.epochs
        return cls(total, train.log_every_steps, evaluate, train.checkpoint_every_steps or evaluate, epoch)

    def describe(self, train: TrainConfig) -> str:
        """One line for the log."""
        return (
            f"schedule: {self.total:,} steps of {train.batch_size:,} images, {self.epoch:,} an epoch; a warm-up of "
            f"{train.warmup_steps:,}; an evaluation every {self.evaluate_every:,}"
        )

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

    def fetch(self, batch_size: int) -> dict[str, Any]:
        """Means over the window's steps that were not skipped, how many were, and images/s; empties it.

        If all were skipped, the means are over those with a finite gradient, so that the log tells how large it is.
        """
        counts = [count for _, count in self._parts]
        fetched = jax.device_get([metrics for metrics, _ in self._parts])

        def joined(*leaves: np.ndarray) -> np.ndarray:
            return np.concatenate([leaf[:count] for leaf, count in zip(leaves, counts, strict=True)])

        def mean(values: np.ndarray) -> Any:
            all_skipped = np.full(values.shape[1:], math.nan)
            return values[learned].mean(axis=0, dtype=np.float64) if learned.any() else all_skipped

        steps: Metrics = jax.tree.map(joined, *fetched)
        finite = np.asarray(steps.skipped == 0)
        learned = finite & (steps.too_large == 0)
        if not learned.any():
            learned = finite
        means: Metrics = jax.tree.map(mean, steps)
        values = figures(means.loss) | {"gradient_norm": float(means.gradient_norm)}
        values["skipped"] = int(steps.skipped.sum())
        if steps.too_large.any():
            values["too_large"] = int(steps.too_large.sum())
        values["images_per_second"] = len(learned) * batch_size / self._seconds
        self._parts, self._seconds = [], 0.0
        return values


@dataclasses.dataclass
class Skips:
    """How many of the last steps were skipped one after another."""

    not_finite: int = 0
    unlearned: int = 0  # also for a gradient that was too large

    def add(self, metrics: Metrics, count: int) -> None:
        """Adds a dispatch of `count` steps."""
        not_finite, too_large = (
            np.asarray(steps)[:count] for steps in jax.device_get((metrics.skipped, metrics.too_large))
        )
        self.not_finite = _in_row(not_finite, self.not_finite)
        self.unlearned = _in_row(not_finite + too_large, self.unlearned)

    def diverged(self, config: TrainConfig) -> tuple[str, str] | None:
        """What happened and the remedy, once the run learns nothing any more."""
        if self.not_finite >= config.max_skipped_steps:
            what = f"the loss or its gradient was not finite in the last {self.not_finite:,} steps"
            return what, "lower --config.train.learning_rate or set --config.train.clip_norm=1"
        if self.unlearned >= MAX_UNLEARNED_STEPS:
            what = f"the gradient was more than {config.skip_factor:g} times as large as usual, or not finite"
            remedy = "lower --config.train.learning_rate, or raise --config.train.skip_factor"
            return f"{what}, in the last {self.unlearned:,} steps", remedy
        return None


def _in_row(skipped: Float[np.ndarray, " s"], before: int) -> int:
    """How many of the last steps were skipped one after another; `before` were so before these."""
    learned = np.flatnonzero(skipped == 0)
    return len(skipped) - int(learned[-1]) - 1 if len(learned) else before + len(skipped)


def figures(loss: Loss) -> dict[str, Any]:
    """The fields of a loss as plain numbers; `rates` only where there are several groups of latents."""
    values: dict[str, Any] = {name: float(value) for name, value in loss._asdict().items() if name != "rates"}
    return values | ({"rates": [float(rate) for rate in loss.rates]} if len(loss.rates) > 1 else {})


def dispatch_length(seconds_per_step: float, capacity: int) -> int:
    """Steps of the next dispatch: one to begin with, then as many as last about `DISPATCH_SECONDS`."""
    if not seconds_per_step:
        return 1
    return max(1, min(capacity, round(DISPATCH_SECONDS / seconds_per_step)))
