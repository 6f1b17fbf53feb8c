"""Samples, reconstructions and interpolations of a model against real faces, by features of a network."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from facevae_jax.core.errors import UserError
from facevae_jax.latents.paths import lerp
from facevae_jax.latents.temperature import Temperature
from facevae_jax.metrics import inception
from facevae_jax.metrics.frechet import KERNEL_IMAGES, features_of, frechet_distance, kernel_distance
from facevae_jax.metrics.likelihood import SEED
from facevae_jax.trained.codes import encode_all, image_blocks
from facevae_jax.trained.model import TrainedModel

PATHS, PATH_PICTURES = 100, 9  # between two images, whose smoothness is measured
SMALLEST_DISTANCE = 1e-12  # between the features of a path's ends


class PathScores(NamedTuple):
    """Means over some paths; both are 1 for a straight path at a constant pace."""

    length: float  # sum of the steps / distance of the ends; above 1: the path leaves the straight line
    largest_step: float  # largest / mean step; above 1: the change comes in a jump


def sample_distances(
    trained: TrainedModel,
    split: str,
    *,
    extract: Any,
    prior: str,
    count: int,
    temperature: Temperature = 1.0,
    seed: int = SEED,
) -> dict[str, Any]:
    """Distances of samples, reconstructions and faces halfway between two to images of a split, by any features.

    The last are halfway between the codes of each image and the next; the smoothness of that line is measured too. A
    hierarchy's groups below the code are at their priors' means there.

    Args:
      trained: the model.
      split: of the real images.
      extract: from uint8 images [n, h, w, 3] to features [n, d].
      prior: of the samples, fitted to the training split.
      count: images of each set, at most; the split's first ones.
      temperature: of the samples.
      seed: of the samples.

    Raises:
      UserError: the data are not there; the features are not one row for each image.
    """
    pixels = _compared(trained, split, count)
    count, size = len(pixels), trained.inference.batch_size
    real = features_of(extract, image_blocks(pixels, size))
    made = features_of(extract, trained.sample_stream(count, prior=prior, temperature=temperature, seed=seed))
    means = encode_all(trained.inference, image_blocks(pixels, size), count).mean
    again = features_of(extract, trained.inference.reconstruct_stream(image_blocks(pixels, size)))
    halfway = features_of(extract, _between(trained, means, (0.5,)))
    pairs = min(PATHS, count)
    steps = features_of(extract, _between(trained, means[:pairs], np.linspace(0, 1, PATH_PICTURES).tolist()))
    smoothness = path_scores(steps.reshape(pairs, PATH_PICTURES, -1))
    return {
        "images": count,
        "prior": prior,
        "split": split,
        "features": real.shape[1],
        "kernel_images": min(count, KERNEL_IMAGES),
        "sample_frechet": frechet_distance(made, real),
        "sample_kernel": kernel_distance(made, real),
        "reconstruction_frechet": frechet_distance(again, real),
        "reconstruction_kernel": kernel_distance(again, real),
        "interpolation_frechet": frechet_distance(halfway, real),
        "ways": pairs,
        **({f"interpolation_{name}": value for name, value in smoothness._asdict().items()} if smoothness else {}),
    }


def inception_distances(
    trained: TrainedModel,
    split: str,
    *,
    weights: Any,
    prior: str,
    count: int,
    temperature: Temperature = 1.0,
    seed: int = SEED,
) -> dict[str, Any]:
    """FID and KID of samples, and of reconstructions, to images of a split; see `sample_distances`.

    Args:
      trained: the model.
      split: of the real images.
      weights: see `inception.fidelity`.
      prior: of the samples, fitted to the training split.
      count: images of each set, at most; the split's first ones.
      temperature: of the samples.
      seed: of the samples.

    Raises:
      UserError: the data are not there, or torch-fidelity or its weights are not.
    """
    pixels = _compared(trained, split, count)
    count, size = len(pixels), trained.inference.batch_size
    sets = {
        "sample": trained.sample_stream(count, prior=prior, temperature=temperature, seed=seed),
        "reconstruction": trained.inference.reconstruct_stream(image_blocks(pixels, size)),
    }
    found: dict[str, Any] = {
        "images": count,
        "prior": prior,
        "split": split,
        "extractor": inception.EXTRACTOR,
        "resize": "by torch-fidelity, bilinear to 299x299 as in TensorFlow 1",
    }
    for name, made in sets.items():
        real = image_blocks(pixels, size)
        distances = inception.fidelity(made, real, count=count, resolution=trained.resolution, weights=weights)
        found |= {f"{name}_{key}": value for key, value in distances.items()}
    return found


def _compared(trained: TrainedModel, split: str, count: int) -> np.ndarray:
    """The first `count` images of a split, or as many as there are."""
    pixels = trained.dataset.images(split)[:count]
    if len(pixels) < 2:
        raise UserError(f"the split {split!r} has {len(pixels)} images: two at least are needed.")
    return pixels


def _between(trained: TrainedModel, means: np.ndarray, weights: Sequence[float]) -> Iterator[np.ndarray]:
    """Faces on the lines from each latent to the next, and from the last to the first."""
    lines = [lerp(a, b, weights) for a, b in zip(means, np.roll(means, -1, axis=0), strict=True)]
    return trained.inference.decode_stream(trained.inference.batches(np.concatenate(lines)))


def path_scores(features: Float[np.ndarray, "n k d"]) -> PathScores | None:
    """Scores of `n` paths of `k` pictures each, from the features of the pictures.

    The steps are those of the perceptual path length (Karras et al. 2019, section 4.1) over a whole path instead of at
    a point. A path whose ends have equal features is left out; None if there is no other.
    """
    steps = np.linalg.norm(np.diff(features, axis=1), axis=2)
    distance = np.linalg.norm(features[:, -1] - features[:, 0], axis=1)
    moved = distance > SMALLEST_DISTANCE
    if not moved.any():
        return None
    steps, distance = steps[moved], distance[moved]
    return PathScores(
        length=float(np.mean(steps.sum(axis=1) / distance)),
        largest_step=float(np.mean(steps.max(axis=1) / steps.mean(axis=1))),
    )
