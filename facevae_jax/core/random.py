"""Random streams: every number of a run comes from (seed, stream name, step, row); no key is ever stored."""

import zlib
from collections.abc import Sequence

import jax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PRNGKeyArray


def named_key(seed: int, name: str) -> PRNGKeyArray:
    """The root of one stream: the seed's key with the name folded in."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def keys_of(key: PRNGKeyArray, numbers: Int[ArrayLike, " n"]) -> Key[Array, " n"]:
    """One key for each number, such as the rows of a batch; it depends on its own number alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def substream(keys: Key[Array, " n"], number: int) -> Key[Array, " n"]:
    """Stream `number` of each of `keys`, such as the keys of images for one layer of a model."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def normal(keys: Key[Array, " n"], shape: Sequence[int]) -> Float[Array, "n ..."]:
    """Draws from N(0, I) of one shape, one for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
