"""Principal components of a split that need not fit into memory: a randomised range finder in passes over batches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from facevae_jax.data.batches import gather_rows
from facevae_jax.errors import UserError
from facevae_jax.random import named_key

OVERSAMPLING = 32  # directions beside those that are wanted (Halko, Martinsson & Tropp 2011, section 4.3)
POWER_PASSES = 4  # each multiplies by the covariance, so that directions of little variance fade
BATCH, BATCH_VALUES = 1_024, 2**26  # images at a time, and pixel values of them: a quarter of a GiB
SMALLEST_DEVIATION = 1e-6
_times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # accelerators round the factors otherwise


def fit_pca(
    images: UInt8[np.ndarray, "n h w c"], components: int, *, seed: int, beat: Callable[[], None] = lambda: None
) -> dict[str, Array]:
    """Parameters of `models.pca.PCA`: mean, components by falling variance, and their standard deviations.

    Args:
      images: of the training split, which are read once for each pass.
      components: how many.
      seed: of the random directions that it starts from.
      beat: called after each batch.

    Raises:
      UserError: there are not more images, or pixel values, than components.
    """
    size = images[0].size
    if components >= min(len(images), size):
        raise UserError(
            f"config.model.latent_dim={components}: PCA of {len(images):,} images has at most "
            f"{min(len(images), size) - 1:,} components."
        )

    def total(of_batch: Callable[[Array], Any]) -> Any:
        sums: Any = None
        batch = max(1, min(BATCH, BATCH_VALUES // size))
        for at in range(0, len(images), batch):
            rows = np.arange(at, min(at + batch, len(images)))
            part = of_batch(jnp.asarray(gather_rows(images, rows)).reshape(len(rows), -1))
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
            jax.block_until_ready(sums)
            beat()
        return sums

    mean = total(_sum) / len(images)
    width = min(components + OVERSAMPLING, len(images), size)
    basis = jax.random.normal(named_key(seed, "pca"), (size, width))
    for _ in range(POWER_PASSES):
        basis, _ = jnp.linalg.qr(total(functools.partial(_covariance_times, mean=mean, basis=basis)))
    inside = total(functools.partial(_projected_covariance, mean=mean, basis=basis)) / len(images)
    values, vectors = jnp.linalg.eigh(inside)
    order = jnp.argsort(-values)[:components]
    found = _times(basis, vectors[:, order]).T
    # The sign is free: the largest coefficient is positive, so that equal data give equal pictures.
    largest = jnp.take_along_axis(found, jnp.argmax(jnp.abs(found), axis=1)[:, None], axis=1)
    return {
        "mean": mean,
        "components": found * jnp.sign(largest),
        "deviations": jnp.sqrt(jnp.maximum(values[order], SMALLEST_DEVIATION**2)),
    }


def eigenfaces(params: Any, shape: tuple[int, int, int], count: int) -> UInt8[np.ndarray, "n h w c"]:
    """The mean face, then the first `count` - 1 components, grey where they are 0, each scaled to its largest."""
    components = np.asarray(params["components"])[: count - 1]
    scaled = 0.5 + 0.5 * components / np.abs(components).max(axis=1, keepdims=True)
    faces = np.concatenate([np.asarray(params["mean"])[None], scaled])
    return np.round(255 * faces.clip(0, 1)).astype(np.uint8).reshape(-1, *shape)


@jax.jit
def _sum(pixels: UInt8[Array, "b d"]) -> Float[Array, " d"]:
    return jnp.sum(pixels.astype(jnp.float32) / 255.0, axis=0)


@jax.jit
def _covariance_times(
    pixels: UInt8[Array, "b d"], *, mean: Float[Array, " d"], basis: Float[Array, "d k"]
) -> Float[Array, "d k"]:
    centred = pixels.astype(jnp.float32) / 255.0 - mean
    return _times(centred.T, _times(centred, basis))


@jax.jit
def _projected_covariance(
    pixels: UInt8[Array, "b d"], *, mean: Float[Array, " d"], basis: Float[Array, "d k"]
) -> Float[Array, "k k"]:
    projected = _times(pixels.astype(jnp.float32) / 255.0 - mean, basis)
    return _times(projected.T, projected)
