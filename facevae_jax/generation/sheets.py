"""Rows of faces, and the order of dimensions, for command, report and explorer alike."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from facevae_jax.inference import Detailed
from facevae_jax.latents import paths
from facevae_jax.trained.model import TrainedModel

ALPHAS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # standard deviations, of edits and traversals
MOST_MOVED = 1_024  # dimensions of a code that are compared by what they change, at most


class Details(NamedTuple):
    """What a hierarchy's groups below the code are in each picture of a sheet: a mixture of those of some faces.

    The weights are those of arcs, since the middle of a line would have weaker details than its ends. There are none of
    a model whose code is all of its latents.
    """

    of_faces: Float32[np.ndarray, "f d"]  # as of `TrainedModel.details`
    weights: Float[np.ndarray, "rows columns f"]

    @classmethod
    def of_rows(cls, details: Float32[np.ndarray, "f d"], faces: Sequence[int], *, columns: int) -> "Details | None":
        """All pictures of a row have the details of one face."""
        if not details.shape[1]:
            return None
        return cls(details, np.repeat(np.eye(len(details))[list(faces)][:, None], columns, axis=1))

    @classmethod
    def of_paths(
        cls, details: Float32[np.ndarray, "f d"], steps: int, *, rows: int = 1, loop: bool = False
    ) -> "Details | None":
        """Those of `paths.path` through the faces of each row, which has as many as the others."""
        if not details.shape[1]:
            return None
        stops = np.eye(len(details)).reshape(rows, -1, len(details))
        return cls(details, np.stack([paths.path(row, steps, method="slerp", loop=loop) for row in stops]))

    @classmethod
    def of_square(cls, details: Float32[np.ndarray, "f d"], *, side: int) -> "Details | None":
        """Those of `paths.square` between four faces."""
        if not details.shape[1]:
            return None
        return cls(details, paths.square(np.eye(4), rows=side, columns=side, method="slerp"))


def decode_stream(
    trained: TrainedModel, latents: Float[np.ndarray, "rows columns z"], details: Details | None = None
) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
    """Faces of latents in rows, a batch at a time; without details the groups below are at their priors' means."""
    inference, flat = trained.inference, latents.reshape(-1, trained.code_size)
    if details is None:
        return inference.decode_stream(inference.batches(flat))
    weights = details.weights.reshape(len(flat), -1).astype(np.float32)
    # Mixed batch by batch: the details of one face of 1024x1024 may take 100 MB.
    mixed = (Detailed(codes, of @ details.of_faces) for codes, of in inference.batches((flat, weights)))
    return inference.decode_detailed(mixed)


def decode_rows(
    trained: TrainedModel, latents: Float[np.ndarray, "rows columns z"], details: Details | None = None
) -> UInt8[np.ndarray, "rows columns r r 3"]:
    """Faces of latents in rows."""
    images = np.concatenate(list(decode_stream(trained, latents, details)))
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

    This asks the decoder, not the posteriors, so that it needs no images. Of a code with more than `MOST_MOVED`
    dimensions, those with the largest standard deviations.
    """
    mean, deviations = trained.moments.mean.astype(np.float32), standard_deviations(trained)
    (average,) = trained.decode(mean[None]).astype(np.float32)
    dimensions = np.sort(np.argsort(-deviations, kind="stable")[:MOST_MOVED])
    moved = np.tile(mean, (len(dimensions), 1))
    moved[np.arange(len(dimensions)), dimensions] += deviations[dimensions]
    decoded = trained.inference.decode_stream(trained.inference.batches(moved))
    changes = [np.square(images - average).mean(axis=(1, 2, 3)) for images in decoded]
    return dimensions[np.argsort(-np.concatenate(changes), kind="stable")].tolist()
