"""What is done to images on the device; keyed by (seed, step, row), so resuming and other devices change nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from facevae_jax.data.batches import Batch
from facevae_jax.random import named_key

GREY_LEVELS = 256


def row_keys(rows: Int[Array, " b"], *, seed: int, stream: str, step: Array | int) -> PRNGKeyArray:
    """One key for each row of a batch, wherever in the batch and on whichever device it is."""
    key = jax.random.fold_in(named_key(seed, stream), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def random_flip(batch: Batch, *, seed: int, step: Array | int) -> UInt8[Array, "b h w c"]:
    """The images, each mirrored left to right with probability 1/2."""
    flips = jax.vmap(jax.random.bernoulli)(row_keys(batch.rows, seed=seed, stream="flip", step=step))
    return jnp.where(flips[:, None, None, None], batch.images[:, :, ::-1], batch.images)


def dequantize(
    images: UInt8[Array, "b h w c"], rows: Int[Array, " b"], *, seed: int, stream: str, step: Array | int
) -> Float[Array, "b h w c"]:
    """The images in [0, 1] with uniform noise as wide as a grey level (Theis et al. 2016, section 3.1).

    A density of (x + u) / 256, u uniform in [0, 1), bounds the probability of the whole numbers x from below, which a
    density of x / 255 does not: it can grow without limit.
    """
    keys = row_keys(rows, seed=seed, stream=stream, step=step)
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images.astype(jnp.float32) + noise) / GREY_LEVELS
