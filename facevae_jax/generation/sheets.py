"""Rows of faces, and the order of dimensions, for command, report and explorer alike."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, UInt8

from facevae_jax.trained.model import TrainedModel

ALPHAS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # standard deviations, of edits and traversals


def decode_rows(
    trained: TrainedModel, latents: Float[np.ndarray, "rows columns z"]
) -> UInt8[np.ndarray, "rows columns r r 3"]:
    """Faces of latents in rows."""
    images = trained.decode(latents.reshape(-1, trained.code_size))
    return images.reshape(*latents.shape[:2], *images.shape[1:])


def traversal(
    trained: TrainedModel, base: Float32[np.ndarray, " z"], dimensions: Sequence[int], alphas: Sequence[float] = ALPHAS
) -> Float32[np.ndarray, "rows columns z"]:
    """Latents with one dimension changed in each row, by `alphas` times its standard deviation."""
    deviations = standard_deviations(trained)
    latents = np.tile(base, (len(dimensions), len(alphas), 1))
    for row, dimension in enumerate(dimensions):
        latents[row, :, dimension] += deviations[dimension] * np.asarray(alphas, np.float32)
    return latents


def standard_deviations(trained: TrainedModel) -> Float32[np.ndarray, " z"]:
    """Standard deviations of the aggregate posterior, along each dimension of the flat code."""
    return np.sqrt(np.diag(trained.moments.covariance).clip(0.0)).astype(np.float32)


def strongest_dimensions(trained: TrainedModel) -> list[int]:
    """Latent dimensions by how much a standard deviation changes the mean face, the largest change first.

    This asks the decoder, not the posteriors, so that it needs no images.
    """
    mean = trained.moments.mean.astype(np.float32)
    (average,) = trained.decode(mean[None]).astype(np.float32)
    moved = mean + np.diag(standard_deviations(trained))
    decoded = trained.inference.decode_stream(trained.inference.batches(moved))
    changes = [np.square(images - average).mean(axis=(1, 2, 3)) for images in decoded]
    return np.argsort(-np.concatenate(changes), kind="stable").tolist()
