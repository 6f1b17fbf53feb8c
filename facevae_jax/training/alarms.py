"""Checks for common failures of VAEs after each evaluation, each with its remedy, and once as long as it lasts."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

COLLAPSED = 0.05  # of the latent dimensions: with fewer active, most of the latent is not used
EXPLODED = 10.0  # times the KL of the evaluation before, and more nats than
EXPLODED_NATS = 1_000.0
ABSURD_NATS = 1_000.0  # for each latent dimension: far above any useful rate
DEAD = 0.95  # of the error of the mean image, which a decoder that ignores its latents reaches
SHOWN_GROUPS = 8
TREND, FALLING = 4, 0.97  # evaluations, over which an error that falls is at most this part
OVERFITTED = 0.05  # of the lowest validation loss so far, or of the way down to it, while the training loss fell
IDLE_NATS = 0.01  # a group of a hierarchy with a smaller rate says nothing of an image
SAMPLED = 1_024  # images for the mean one


class Alarms:
    """Checks one evaluation after another."""

    def __init__(self, images: UInt8[np.ndarray, "n h w c"]) -> None:
        """`images` are those of the evaluations."""
        self._mean_image_error = _mean_image_error(images[:SAMPLED])
        self._before: Mapping[str, Any] | None = None  # the evaluation before
        self._errors: list[float] = []  # of all evaluations
        self._idle: Any = 0  # evaluations since each group of latents carried something
        self._first: float | None = None  # evaluation loss
        self._raised: set[str] = set()  # alarms of the evaluation before
        self._best: tuple[float, float] | None = None  # evaluation loss and the training loss of that time

    def check(
        self, evaluation: Mapping[str, Any], training_loss: float | None, *, latent_units: int, warming: bool = False
    ) -> list[str]:
        """A line for each failure that the evaluation before did not have.

        Some need several evaluations, since training has only begun at the first.

        Args:
          evaluation: `loss`, `mse`, `kl` and, of a model with a KL divergence, `active_units`, and `rates` of groups.
          training_loss: of the last steps; None where none were logged yet.
          latent_units: latent dimensions of all groups.
          warming: the learning rate or the KL weight still grows: nothing is judged.
        """
        if warming:
            return []
        found = {
            line.partition(":")[0]: line
            for line in self._failures(evaluation, training_loss, latent_units=latent_units)
        }
        new = [line for name, line in found.items() if name not in self._raised]
        self._raised = set(found)
        return new

    def _failures(
        self, evaluation: Mapping[str, Any], training_loss: float | None, *, latent_units: int
    ) -> Iterator[str]:
        yield from self._overfitting(evaluation["loss"], training_loss)
        yield from self._dead_groups(np.asarray(evaluation.get("rates", ())))
        before, self._before = self._before, evaluation
        self._errors.append(evaluation["mse"])
        if "active_units" in evaluation and (
            evaluation["kl"] > ABSURD_NATS * latent_units
            or (before is not None and evaluation["kl"] > max(EXPLODED * before["kl"], EXPLODED_NATS))
        ):
            yield (
                f"exploding KL: {evaluation['kl']:,.0f} nats: lower --config.train.learning_rate or set "
                "--config.train.clip_norm=1."
            )
        if before is None:
            return
        active = [of.get("active_units", latent_units) for of in (before, evaluation)]
        if latent_units and max(active) < max(1, COLLAPSED * latent_units):
            yield (
                f"posterior collapse: {active[1]:.0f} of {latent_units} latent dimensions are active: lower "
                "--config.objective.kl_weight (or raise r_loss_factor, of the likelihood mse), or set "
                "--config.objective.kl_warmup_steps or free_bits."
            )
        # Of one image alone the mean is the image.
        dead = self._mean_image_error > 0 and min(self._errors[-2:]) > DEAD * self._mean_image_error
        if dead and len(self._errors) >= TREND and self._errors[-1] > FALLING * self._errors[-TREND]:
            yield (
                f"dead decoder: MSE {evaluation['mse']:.4f} no longer falls, and the mean image alone has "
                f"{self._mean_image_error:.4f}: the reconstructions hardly depend on the image; lower "
                "--config.train.learning_rate or --config.objective.kl_weight."
            )

    def _dead_groups(self, rates: np.ndarray) -> list[str]:
        self._idle = np.where(rates < IDLE_NATS, self._idle + 1, 0)
        dead = np.flatnonzero(self._idle >= TREND)
        if len(rates) < 2 or not len(dead):
            return []
        numbers = ", ".join(f"{number + 1}" for number in dead[:SHOWN_GROUPS])
        return [
            f"dead groups: {len(dead)} of {len(rates)} groups of latents carry less than {IDLE_NATS} nats (from the "
            f"top: {numbers}{', ...' if len(dead) > SHOWN_GROUPS else ''}): set --config.objective.free_bits=1 and "
            "--config.objective.free_bits_per=group, or more --config.objective.kl_warmup_steps, or take these blocks "
            "out of --config.model.decoder_blocks."
        ]

    def _overfitting(self, loss: float, training_loss: float | None) -> list[str]:
        if training_loss is None:
            return []
        self._first = loss if self._first is None else self._first
        if self._best is None or loss < self._best[0]:
            self._best = (loss, training_loss)
            return []
        best, training_then = self._best
        # By the distance, not the ratio: a negative log likelihood may be below zero.
        margin = OVERFITTED * max(abs(best), self._first - best)
        if loss > best + margin and training_loss < min(training_then, best):
            return [
                f"over-fitting: loss {loss:,.2f}, {best:,.2f} at its best, while in training it fell from "
                f"{training_then:,.2f} to {training_loss:,.2f}: stop here (the best checkpoint is kept), or set "
                "--config.data.flip or --config.model.dropout_rate, or take more images or a smaller model."
            ]
        return []


def _mean_image_error(images: UInt8[np.ndarray, "n h w c"]) -> float:
    """The mean squared error of the mean of some images, pixels from 0 to 1."""
    square = np.einsum("nhwc,nhwc->", images, images, dtype=np.float64) / images.size  # in buffers, not one copy
    return float(square - np.square(images.mean(axis=0)).mean()) / 255.0**2
