"""Checks for common failures of VAEs after each evaluation, each with its remedy."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

COLLAPSED = 0.05  # of the latent dimensions: with fewer active, most of the latent is not used
EXPLODED = 10.0  # times the KL of the evaluation before, and more nats than
EXPLODED_NATS = 1_000.0
ABSURD_NATS = 1_000.0  # for each latent dimension: far above any useful rate
DEAD = 0.95  # of the error of the mean image, which a decoder that ignores its latents reaches
OVERFITTED = 1.05  # times the lowest validation loss so far, while the training loss fell
SAMPLED = 1_024  # images for the mean one


class Alarms:
    """Checks one evaluation after another."""

    def __init__(self, images: UInt8[np.ndarray, "n h w c"]) -> None:
        """`images` are those of the evaluations."""
        self._mean_image_error = _mean_image_error(images[:SAMPLED])
        self._before: Mapping[str, float] | None = None  # the evaluation before
        self._best: tuple[float, float] | None = None  # evaluation loss and the training loss of that time

    def check(self, evaluation: Mapping[str, float], training_loss: float | None, *, latent_units: int) -> list[str]:
        """A line for each failure; some need a second evaluation, since training has only begun at the first.

        Args:
          evaluation: `loss`, `mse`, `kl` and, of a model with a KL divergence, `active_units`.
          training_loss: of the last steps; None where none were logged yet.
          latent_units: latent dimensions of all groups.
        """
        lines, before, self._before = self._overfitting(evaluation["loss"], training_loss), self._before, evaluation
        if "active_units" in evaluation and (
            evaluation["kl"] > ABSURD_NATS * latent_units
            or (before is not None and evaluation["kl"] > max(EXPLODED * before["kl"], EXPLODED_NATS))
        ):
            lines.append(
                f"exploding KL: {evaluation['kl']:,.0f} nats: lower --config.train.learning_rate or set "
                "--config.train.clip_norm=1."
            )
        if before is None:
            return lines
        active = [of.get("active_units", latent_units) for of in (before, evaluation)]
        if latent_units and max(active) < max(1, COLLAPSED * latent_units):
            lines.append(
                f"posterior collapse: {active[1]:.0f} of {latent_units} latent dimensions are active: lower "
                "--config.objective.kl_weight (or raise r_loss_factor, of the likelihood mse), or set "
                "--config.objective.kl_warmup_steps or free_bits."
            )
        # Of one image alone the mean is the image.
        if self._mean_image_error > 0 and evaluation["mse"] > DEAD * max(self._mean_image_error, before["mse"]):
            lines.append(
                f"dead decoder: MSE {evaluation['mse']:.4f} no longer falls, and the mean image alone has "
                f"{self._mean_image_error:.4f}: the reconstructions hardly depend on the image; lower "
                "--config.train.learning_rate or --config.objective.kl_weight."
            )
        return lines

    def _overfitting(self, loss: float, training_loss: float | None) -> list[str]:
        if training_loss is None:
            return []
        if self._best is None or loss < self._best[0]:
            self._best = (loss, training_loss)
            return []
        best, training_then = self._best
        # By the distance, not the ratio: a negative log likelihood may be below zero.
        margin = (OVERFITTED - 1.0) * abs(best)
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
