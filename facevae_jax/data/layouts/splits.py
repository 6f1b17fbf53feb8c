"""Validation images of a collection that has none of its own."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int

from facevae_jax.data.layouts.types import TRAIN, VALIDATION

VALIDATION_FRACTION = 0.1  # of a collection that has no split of its own


def hold_out(rows: Int[np.ndarray, " n"], name_of: Callable[[int], str]) -> dict[str, Int[np.ndarray, " m"]]:
    """The rows for training and, about a tenth, for validation, by the hashes of their names."""
    validates = validation_by_hash(name_of(int(row)) for row in rows)
    return {TRAIN: rows[~validates], VALIDATION: rows[validates]}


def validation_by_hash(names: Iterable[str]) -> Bool[np.ndarray, " n"]:
    """Which images are for validation: about a tenth, by their names alone.

    With two images or more no split is empty: the image with the smallest hash is for validation, the one with the
    largest for training.
    """
    hashes = np.fromiter(map(_unit_hash, names), np.float64)
    validates = hashes < VALIDATION_FRACTION
    validates[hashes.argmin()] = True
    validates[hashes.argmax()] = False
    return validates


def _unit_hash(name: str) -> float:
    """A number from 0 to 1 that depends on `name` only."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
