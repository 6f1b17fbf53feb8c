"""Any folder or .zip file of PNG, JPEG or WebP files."""

import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool

from facevae_jax.data.layouts.types import TRAIN, VALIDATION, Layout, guess_layout, splits_of, wrong_source
from facevae_jax.data.sources.opening import list_files, open_source

VALIDATION_FRACTION = 0.1  # of a collection that has no split of its own


def folder_layout(path: pathlib.Path) -> Layout:
    """All images in `path`; about a tenth of them, chosen by the hash of the name, are for validation.

    Raises UserError: there is no such source, or no image in it.
    """
    source = open_source(path)
    listing = list_files(source)
    rows = listing.image_rows
    if not len(rows):
        raise wrong_source(source, expected="PNG, JPEG or WebP files", layout="folder")
    fitting = guess_layout(source)
    hint = f"this folder fits --layout={fitting}, which knows its splits and attributes."
    validates = validation_by_hash(listing.names[row] for row in rows)
    return Layout(
        kind="folder",
        source=path.name,
        splits=splits_of(listing, {TRAIN: rows[~validates], VALIDATION: rows[validates]}),
        notes=tuple(filter(None, (*source.notes, listing.ignored_note, hint if fitting else ""))),
    )


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
