"""Random streams: every number of a run comes from (seed, stream name, step); no key is ever stored."""

import zlib

import jax
from jaxtyping import PRNGKeyArray


def named_key(seed: int, name: str) -> PRNGKeyArray:
    """The root of one stream: the seed's key with the name folded in; the caller folds in the step."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
