"""A checksum of arrays, computed on their device, that is the same on any number of devices.

A checkpoint passes through a compressor, a disk and a network, and none of them reports a flipped bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, UInt32


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A one-to-one function that scatters its argument (the finalizer of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _checksum(array: Array) -> UInt32[Array, ""]:
    """The sum modulo 2**32 of every word, scattered with its position.

    Whole numbers add up the same in any order. One word that differs always changes the sum; several cancel out once
    in 2**32.
    """
    words = lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    positions = _mix(lax.iota(jnp.uint32, words.size) + jnp.uint32(1))
    return jnp.sum(_mix(words ^ positions), dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> dict[str, list[Array]]:
    return {name: [_checksum(leaf) for leaf in jax.tree.leaves(part)] for name, part in tree.items()}


@jax.jit
def _finite(tree: Any) -> Bool[Array, ""]:
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))


def is_finite(tree: Any) -> bool:
    """Whether every number of a tree of arrays is finite."""
    return bool(_finite(tree))


def checksums(tree: dict[str, Any]) -> dict[str, list[int]]:
    """Of every array of every part, in the order of `jax.tree.leaves`; the arrays have elements of 4 bytes."""
    return jax.tree.map(int, jax.device_get(_checksums(tree)))
