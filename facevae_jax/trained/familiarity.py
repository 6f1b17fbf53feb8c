"""Whether photographs look like what a model was trained on, by how well it reconstructs them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from facevae_jax.core.errors import UserError, some
from facevae_jax.trained.model import TrainedModel

KNOWN = 256  # images of the evaluation split, whose errors are the measure
UNLIKE = 2.0  # times the largest of their errors, but for a hundredth of them
ARTIFACT = "reconstruction-errors"


def reconstruction_errors(trained: TrainedModel, images: Shaped[np.ndarray, "n r r 3"]) -> Float[np.ndarray, " n"]:
    """The mean squared error of each image's reconstruction, pixels from 0 to 1."""
    images = trained.check_images(images)
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    difference = images.astype(np.float64) / scale - trained.reconstruct(images) / 255.0
    return np.square(difference).reshape(len(images), -1).mean(axis=1)


def familiar_error(trained: TrainedModel) -> float | None:
    """The error above which an image is unlike the run's own; None where nobody knows it: neither kept nor the data."""
    kept = trained.artifacts.get(ARTIFACT)
    if kept is None:
        try:
            errors = reconstruction_errors(trained, trained.dataset.images(trained.dataset.evaluation_split)[:KNOWN])
        except UserError:
            return None
        trained.artifacts.put(ARTIFACT, {"errors": errors})
    else:
        errors = kept.arrays["errors"]
    return UNLIKE * float(np.quantile(errors, 0.99))


def unlike_training(trained: TrainedModel, images: UInt8[np.ndarray, "n r r 3"]) -> Bool[np.ndarray, " n"]:
    """Which images are far from what the model was trained on; none where that is not known."""
    limit = familiar_error(trained)
    return np.zeros(len(images), bool) if limit is None else reconstruction_errors(trained, images) > limit


def note(names: Sequence[str]) -> str:
    """What to tell about such images."""
    return (
        f"{some(names)}: far from the faces that this model was trained on, so the reconstruction may be another face. "
        "Crop it from hair to collar, or take a model of photographs."
    )
