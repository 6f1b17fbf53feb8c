"""What image collections look like on disk: FFHQ, CelebA, a folder of images, a TFDS dataset.

A layout is the list of images by split, how to crop them, and what is known about each. This module has what the
layouts share, and the simplest of them; each other layout has its own.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Float32, Int

from facevae_jax.data.images import Crop, File
from facevae_jax.data.sources import Listing, Source, ignored_note, image_rows, open_source
from facevae_jax.errors import UserError

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
LAYOUTS = ("ffhq", "celeba", "folder", "tfds")
UNKNOWN = math.nan  # value of an attribute that was not labelled

CENTRE_SQUARE = Crop("centre square")
CELEBA_SIZE = (178, 218)  # width and height of the aligned images
CELEBA_CROP = Crop("centre 148x148 of 178x218: left 15, top 35", size=CELEBA_SIZE, box=(15, 35, 163, 183))
FFHQ_FOLDERS = FFHQ_THUMBNAILS, FFHQ_IMAGES = "thumbnails128x128", "images1024x1024"
CELEBA_FOLDERS = ("img_align_celeba", "Img/img_align_celeba")

VALIDATION_FRACTION = 0.1  # of a collection that has no split of its own


class Attribute(NamedTuple):
    """One labelled property of the images; its values are numbers, and `UNKNOWN` where there is no label."""

    name: str
    kind: Literal["binary", "continuous", "categorical"]  # binary: 0 or 1; categorical: a row of `categories`
    categories: tuple[str, ...] = ()


class SourceImage(NamedTuple):
    """One image of a collection."""

    name: str  # path of the file relative to the source, with forward slashes
    file: File
    attributes: tuple[float, ...] = ()  # in the order of the layout's attributes


class Images(Sequence[SourceImage]):
    """Images that are made as they are asked for: a million of them take a few bytes each."""

    def __init__(self, rows: Int[np.ndarray, " n"], make: Callable[[int], SourceImage]) -> None:
        """Image i is `make(rows[i])`."""
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SourceImage: ...

    @overload
    def __getitem__(self, index: slice) -> "Images": ...

    def __getitem__(self, index: int | slice) -> "SourceImage | Images":
        if isinstance(index, slice):
            return Images(self._rows[index], self._make)
        return self._make(int(self._rows[index]))

    def __iter__(self) -> Iterator[SourceImage]:
        return map(self._make, map(int, self._rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A collection of images, in the order in which it is written."""

    kind: str  # one of LAYOUTS
    source: str  # name of the folder, archive or TFDS dataset, without the folders above it
    splits: Mapping[str, Sequence[SourceImage]]  # none is empty
    attributes: tuple[Attribute, ...] = ()
    crop: Crop = CENTRE_SQUARE
    notes: tuple[str, ...] = ()  # what the user should know, a line each


def folder(path: pathlib.Path) -> Layout:
    """A folder or archive of PNG, JPEG or WebP files; a tenth of them, chosen by the hash of the name, validates.

    Raises:
      UserError: there is none, or no image in it.
    """
    source = open_source(path)
    listing = source.files()
    rows = image_rows(listing)
    if not len(rows):
        raise wrong_source(source, expected="PNG, JPEG or WebP files", layout="folder")
    fitting = guess_layout(source)
    hint = f"this folder fits --layout={fitting}, which knows its splits and attributes."
    validates = validation_by_hash(listing.names[row] for row in rows)
    return Layout(
        kind="folder",
        source=path.name,
        splits=in_order({TRAIN: rows[~validates], VALIDATION: rows[validates]}, functools.partial(_image, listing)),
        notes=collect_notes(*source.notes, ignored_note(listing), "" if fitting in (None, "folder") else hint),
    )


def _image(listing: Listing, row: int) -> SourceImage:
    return SourceImage(listing.names[row], listing.file(row))


def labelled_image(
    listing: Listing, row: int, *, prefix: str, values: Float32[np.ndarray, "n a"] | None
) -> SourceImage:
    """Image `row` of a listing whose files lie in the folder `prefix`, with its row of attributes."""
    labels = () if values is None else tuple(values[row].tolist())
    return SourceImage(f"{prefix}/{listing.names[row]}", listing.file(row), labels)


def collect_notes(*lines: str) -> tuple[str, ...]:
    """The lines that are not empty."""
    return tuple(line for line in lines if line)


def validation_by_hash(names: Iterable[str]) -> Bool[np.ndarray, " n"]:
    """Which images validate, by their names alone: about a tenth.

    No split is left empty where there are two images: the image with the smallest hash validates, the one with the
    largest trains.
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


def in_order(
    splits: Mapping[str, Int[np.ndarray, " n"]], make: Callable[[int], SourceImage]
) -> dict[str, Sequence[SourceImage]]:
    """The splits that have images, in their usual order; `splits` has the rows of each, in the order of the names."""
    names = sorted(splits, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    return {name: Images(splits[name], make) for name in names if len(splits[name])}


def guess_layout(source: Source) -> str | None:
    """The layout that a source fits, if any."""
    if source.path.name in FFHQ_FOLDERS or any(source.has_folder(name) for name in FFHQ_FOLDERS):
        return "ffhq"
    if any(source.has_folder(name) for name in CELEBA_FOLDERS):
        return "celeba"
    return "folder" if source.has_images() else None


def wrong_source(source: Source, *, expected: str, layout: str, remedy: str = "", inside: str = "") -> UserError:
    """The error for a source that is not what its layout expects, with the command to try next.

    Args:
      source: as given.
      expected: what the layout looks for.
      layout: one of LAYOUTS.
      remedy: what to do; by default a command with the layout that fits.
      inside: the folder of the source that was looked at.
    """
    fitting = guess_layout(source)
    if not remedy:
        kind, where = (fitting, source.path) if fitting not in (None, layout) else (layout, "DIR")
        remedy = f"try python -m facevae_jax.prepare --layout={kind} --source={where} --resolution=64"
    path = source.path / inside if inside else source.path
    return UserError(f"--source={str(path)!r}: expected {expected}, {source.describe(inside)}: {remedy}.")
