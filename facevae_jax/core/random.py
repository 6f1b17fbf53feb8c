"""Random streams: every number of a run comes from (seed, stream name, step, row); no key is ever stored."""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PRNGKeyArray, UInt32

PROBABILITY_BITS = 16
WORD_BITS = 32


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


def representable(probability: float) -> float:
    """The nearest probability that `bernoulli_words` draws with: a multiple of 2^-16 between 0 and 1, without them."""
    return min(max(round(probability * 2**PROBABILITY_BITS), 1), 2**PROBABILITY_BITS - 1) / 2**PROBABILITY_BITS


def bernoulli_words(keys: Key[Array, " n"], probability: float, size: int) -> UInt32[Array, "n words"]:
    """At least `size` random bits for each key, 32 in a word, each 1 with `representable(probability)`.

    A word and a random one, joined by `and` or `or`, halve the probability p of its bits or take it to (1 + p) / 2. So
    the binary digits of the probability decide what to do with one random word each, from the last digit that is not 0:
    3/4 takes two random bits for each that is drawn, not 32.
    """
    numerator = int(representable(probability) * 2**PROBABILITY_BITS)
    digits = [int(digit) for digit in f"{numerator:0{PROBABILITY_BITS}b}".rstrip("0")]
    words = -(-size // WORD_BITS)
    drawn = jax.vmap(lambda key: jax.random.bits(key, (len(digits), words)))(keys)
    result = jnp.zeros_like(drawn[:, 0])
    for place, digit in reversed(list(enumerate(digits))):
        result = drawn[:, place] | result if digit else drawn[:, place] & result
    return result


def unpack_bits(words: UInt32[Array, "n words"], shape: Sequence[int]) -> Bool[Array, "n ..."]:
    """The bits as arrays of one shape: the first bit of every word, then the second, and so on."""
    numbers = jnp.arange(WORD_BITS, dtype=words.dtype)[None, :, None]
    bits = (words[:, None, :] >> numbers) & np.uint32(1)
    return bits.astype(bool).reshape(len(words), -1)[:, : math.prod(shape)].reshape(-1, *shape)
