"""Samples, reconstructions and interpolations of a model against real faces, by features of a network."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from facevae_jax.core.errors import UserError
from facevae_jax.data.feed import gather_rows
from facevae_jax.latents.paths import lerp
from facevae_jax.metrics import inception, interpolation
from facevae_jax.metrics.frechet import KERNEL_IMAGES, features_of, frechet_distance, kernel_distance
from facevae_jax.metrics.likelihood import SEED
from facevae_jax.trained.model import TrainedModel

PATHS, PATH_PICTURES = 100, 9  # between two images, whose smoothness is measured


def sample_distances(
    trained: TrainedModel, split: str, *, extract: Any, prior: str, count: int, seed: int = SEED
) -> dict[str, Any]:
    """Distances of samples, reconstructions and faces halfway between two to images of a split, by any features.

    The last are halfway between the latents of each image and the next; the smoothness of that line is measured too.

    Args:
      trained: the model.
      split: of the real images.
      extract: from uint8 images [n, h, w, 3] to features [n, d].
      prior: of the samples, fitted to the training split.
      count: images of each set, at most; the split's first ones.
      seed: of the samples.

    Raises:
      UserError: the data are not there; the features are not one row for each image.
    """
    pixels, count = _compared(trained, split, count)
    real = features_of(extract, real_images(trained, pixels, count))
    made = features_of(extract, trained.sample_stream(count, prior=prior, seed=seed))
    means = np.concatenate([trained.inference.encode(batch).mean for batch in real_images(trained, pixels, count)])
    again = features_of(extract, _decoded(trained, means))
    halfway = features_of(extract, _between(trained, means, (0.5,)))
    pairs = min(PATHS, count)
    steps = features_of(extract, _between(trained, means[:pairs], np.linspace(0, 1, PATH_PICTURES).tolist()))
    smoothness = interpolation.path_scores(steps.reshape(pairs, PATH_PICTURES, -1))
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
    trained: TrainedModel, split: str, *, weights: Any, prior: str, count: int, seed: int = SEED, **options: Any
) -> dict[str, Any]:
    """FID and KID of samples, and of reconstructions, to images of a split; see `sample_distances`.

    Args:
      trained: the model.
      split: of the real images.
      weights: see `inception.fidelity`.
      prior: of the samples, fitted to the training split.
      count: images of each set, at most; the split's first ones.
      seed: of the samples.
      options: of `inception.fidelity`.

    Raises:
      UserError: the data are not there, or torch-fidelity or its weights are not.
    """
    pixels, count = _compared(trained, split, count)
    sets = {
        "sample": trained.sample_stream(count, prior=prior, seed=seed),
        "reconstruction": reconstructed_images(trained, pixels, count),
    }
    found: dict[str, Any] = {
        "images": count,
        "prior": prior,
        "split": split,
        "extractor": options.get("extractor", inception.EXTRACTOR),
        "resize": "by torch-fidelity, bilinear to 299x299 as in TensorFlow 1",
    }
    for name, made in sets.items():
        real = real_images(trained, pixels, count)
        distances = inception.fidelity(
            made, real, count=count, resolution=trained.resolution, weights=weights, **options
        )
        found |= {f"{name}_{key}": value for key, value in distances.items()}
    return found


def _compared(trained: TrainedModel, split: str, count: int) -> tuple[np.ndarray, int]:
    """The real images, and how many of them are compared."""
    pixels = trained.dataset.images(split)
    count = min(count, len(pixels))
    if count < 2:
        raise UserError(f"the split {split!r} has {len(pixels)} images: two at least are needed.")
    return pixels, count


def real_images(trained: TrainedModel, pixels: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The first images of a split, in batches."""
    size = trained.inference.batch_size
    for at in range(0, count, size):
        yield gather_rows(pixels, np.arange(at, min(at + size, count)))


def reconstructed_images(trained: TrainedModel, pixels: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Reconstructions of the first images of a split, from the posterior means."""
    return (trained.reconstruct(batch) for batch in real_images(trained, pixels, count))


def _between(trained: TrainedModel, means: np.ndarray, weights: Sequence[float]) -> Iterator[np.ndarray]:
    """Faces on the lines from each latent to the next, and from the last to the first."""
    lines = [lerp(a, b, weights) for a, b in zip(means, np.roll(means, -1, axis=0), strict=True)]
    return _decoded(trained, np.concatenate(lines))


def _decoded(trained: TrainedModel, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Images of latents, in batches."""
    size = trained.inference.batch_size
    return trained.inference.decode_stream(latents[at : at + size] for at in range(0, len(latents), size))
