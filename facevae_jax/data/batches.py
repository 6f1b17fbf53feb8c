"""A batch on the device, and its augmentation: keyed by (seed, step, row), so devices and resuming change nothing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from facevae_jax.core.random import keys_of, named_key
from facevae_jax.data.exchange import Routes, exchange

GRAY_LEVELS = 256


class Batch(NamedTuple):
    """Images and their rows in the split."""

    images: Shaped[Array, "b ..."]  # uint8 [b, h, w, c], or cut into rows as in a chunk
    rows: Int[Array, " b"]  # -1: padding, which has some image or other


class Chunk(NamedTuple):
    """The batches of one dispatch, on the device; of an image its numbers are cut into rows of `data.feed.LANES`."""

    pixels: UInt8[Array, "n l lanes"] | tuple[UInt8[Array, "b l lanes"], ...]  # the split, or the batches themselves
    rows: Int[Array, "k b"]  # rows of each batch in the split
    routes: Routes | None = None  # where each device has a slice of the split


def batch_reader(chunk: Chunk, *, mesh: Mesh | AbstractMesh) -> Callable[[Array | int], Batch]:
    """A function from a batch's number in the chunk to the batch, for use inside a compiled function.

    Its images are still cut into rows: a TPU takes long to cut [b, h, w, c] into parts.
    """
    pixels, rows, routes = chunk
    split = jnp.stack(pixels) if isinstance(pixels, tuple) else pixels

    def read(index: Array | int) -> Batch:
        if isinstance(pixels, tuple):
            images = split[index]
        elif routes is not None:
            images = exchange(split, jax.tree.map(lambda array: array[index], routes), mesh)
        else:
            images = split[jnp.maximum(rows[index], 0)]
        return Batch(images, rows[index])

    return read


def row_keys(rows: Int[Array, " b"], *streams: str, seed: int, step: Array | int) -> tuple[Key[Array, " b"], ...]:
    """For each stream one key for each row of a batch, whatever its place in the batch and its device."""
    roots = jnp.stack([named_key(seed, stream) for stream in streams])
    # All at once, since each operation on a number is a launch of a GPU.
    of_step = jax.vmap(jax.random.fold_in, in_axes=(0, None))(roots, step)
    return tuple(keys_of(key, rows) for key in of_step)


def random_flip(images: UInt8[Array, "b h w c"], keys: Key[Array, " b"]) -> UInt8[Array, "b h w c"]:
    """The images, each mirrored left to right with probability 1/2."""
    flips = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def dequantize(images: UInt8[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """The images in [0, 1] with uniform noise as wide as one gray level (Theis et al. 2016, section 3.1).

    A density of (x + u) / 256, u uniform in [0, 1), is a lower bound of the probability of the integers x; a density of
    x / 255 is not, as it can grow without limit.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images.astype(jnp.float32) + noise) / GRAY_LEVELS
