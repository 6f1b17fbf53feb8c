"""A batch on the device, and its augmentation: keyed by (seed, step, row), so devices and resuming change nothing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from facevae_jax.core.random import keys_of, named_key

GRAY_LEVELS = 256


class Batch(NamedTuple):
    """Images and their rows in the split."""

    images: Shaped[Array, "b ..."]  # uint8 [b, h, w, c]
    rows: Int[Array, " b"]


class Chunk(NamedTuple):
    """The batches of one dispatch, on the device."""

    pixels: Shaped[Array, "n ..."] | tuple[Shaped[Array, "b ..."], ...]  # the whole split, or the batches themselves
    rows: Int[Array, "k b"]  # rows of each batch in the split


def batch_reader(chunk: Chunk) -> Callable[[Array | int], Batch]:
    """A function from a batch's number in the chunk to the batch, for use inside a compiled function."""
    pixels, rows = chunk
    if not isinstance(pixels, tuple):
        return lambda index: Batch(pixels[rows[index]], rows[index])
    batches = jnp.stack(pixels)
    return lambda index: Batch(batches[index], rows[index])


def row_keys(rows: Int[Array, " b"], *, seed: int, stream: str, step: Array | int) -> Key[Array, " b"]:
    """One key for each row of a batch, whatever its place in the batch and its device."""
    return keys_of(jax.random.fold_in(named_key(seed, stream), step), rows)


def random_flip(batch: Batch, *, seed: int, step: Array | int) -> UInt8[Array, "b h w c"]:
    """The images, each mirrored left to right with probability 1/2."""
    flips = jax.vmap(jax.random.bernoulli)(row_keys(batch.rows, seed=seed, stream="flip", step=step))
    return jnp.where(flips[:, None, None, None], batch.images[:, :, ::-1], batch.images)


def dequantize(
    images: UInt8[Array, "b h w c"], rows: Int[Array, " b"], *, seed: int, stream: str, step: Array | int
) -> Float[Array, "b h w c"]:
    """The images in [0, 1] with uniform noise as wide as one gray level (Theis et al. 2016, section 3.1).

    A density of (x + u) / 256, u uniform in [0, 1), is a lower bound of the probability of the integers x; a density of
    x / 255 is not, as it can grow without limit.
    """
    keys = row_keys(rows, seed=seed, stream=stream, step=step)
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images.astype(jnp.float32) + noise) / GRAY_LEVELS
