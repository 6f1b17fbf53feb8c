"""What command, report and explorer show alike: rows of faces, and which dimensions and attributes come first."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, UInt8

from facevae_jax.data.layouts import Attribute
from facevae_jax.generation.trained import TrainedVAE

COLUMNS = 8
ALPHAS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # standard deviations, of edits and traversals
# What faces are mostly edited for, by the names of CelebA, of FFHQ's features and of the drawn faces.
PREFERRED_ATTRIBUTES = (
    *("Smiling", "smile", "Male", "gender", "Young", "age", "Eyeglasses", "glasses", "Blond_Hair", "hair_length"),
    *("Bangs", "Mouth_Slightly_Open", "Bald", "Pale_Skin", "skin_tone", "turn", "beard", "fringe", "mouth_open"),
)


def decode_rows(
    trained: TrainedVAE, latents: Float[np.ndarray, "rows columns z"]
) -> UInt8[np.ndarray, "rows columns r r 3"]:
    """Faces of latents in rows."""
    images = trained.decode(latents.reshape(-1, trained.latent_dim))
    return images.reshape(*latents.shape[:2], *images.shape[1:])


def in_pairs(
    originals: UInt8[np.ndarray, "n r r 3"], reconstructions: UInt8[np.ndarray, "n r r 3"]
) -> UInt8[np.ndarray, "rows columns r r 3"]:
    """Rows of originals, each above its reconstructions; the last row is filled up with white."""
    columns = min(COLUMNS, len(originals))
    white = np.full((-len(originals) % columns, *originals.shape[1:]), 255, np.uint8)
    rows = [
        np.concatenate([images, white]).reshape(-1, columns, *images.shape[1:])
        for images in (originals, reconstructions)
    ]
    return np.stack(rows, axis=1).reshape(-1, columns, *originals.shape[1:])


def traversal(
    trained: TrainedVAE, base: Float32[np.ndarray, " z"], dimensions: Sequence[int], alphas: Sequence[float] = ALPHAS
) -> Float32[np.ndarray, "rows columns z"]:
    """Latents that differ from `base` along one dimension a row, by `alphas` times its standard deviation."""
    deviations = standard_deviations(trained)
    latents = np.tile(base, (len(dimensions), len(alphas), 1))
    for row, dimension in enumerate(dimensions):
        latents[row, :, dimension] += deviations[dimension] * np.asarray(alphas, np.float32)
    return latents


def standard_deviations(trained: TrainedVAE) -> Float32[np.ndarray, " z"]:
    """Of the aggregate posterior, along each dimension; 1 before the first evaluation."""
    return np.sqrt(np.maximum(np.diag(np.asarray(trained.moments.covariance, np.float32)), 0.0))


def strongest_dimensions(trained: TrainedVAE) -> list[int]:
    """Latent dimensions by how much a standard deviation changes the average face, the largest change first.

    The decoder is asked, not the posteriors: that needs no images, which a machine that a model was copied to does not
    have.
    """
    mean, size = trained.mean_latent, trained.inference.batch_size
    (average,) = trained.decode(mean[None]).astype(np.float32)
    moved = mean + np.diag(standard_deviations(trained))
    batches = (moved[at : at + size] for at in range(0, len(moved), size))
    decoded = trained.inference.decode_stream(batches)
    changes = [np.square(images - average).mean(axis=(1, 2, 3)) for images in decoded]
    return np.argsort(-np.concatenate(changes), kind="stable").tolist()


def shown_attributes(attributes: Sequence[Attribute], most: int) -> list[Attribute]:
    """The preferred attributes first, then the others in their order."""
    rank = {name: place for place, name in enumerate(PREFERRED_ATTRIBUTES)}
    return sorted(attributes, key=lambda attribute: rank.get(attribute.name, len(rank)))[:most]


def editable(attributes: Sequence[Attribute]) -> list[Attribute]:
    """Those whose values have an order, which a direction can follow."""
    return [attribute for attribute in attributes if attribute.kind != "categorical"]
