"""What every layout of a collection of images is made of: images by split, how to crop them, and their labels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from facevae_jax.core.errors import UserError
from facevae_jax.data.sources.images import CENTER_SQUARE, Crop
from facevae_jax.data.sources.opening import CELEBA_FOLDERS, FFHQ_FOLDERS, File, Listing, Source

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
UNKNOWN = math.nan  # value of an attribute without a label


class Attribute(NamedTuple):
    """One labeled property of the images; its values are numbers, and `UNKNOWN` where there is no label."""

    name: str
    kind: Literal["binary", "continuous", "categorical"]  # binary: 0 or 1; categorical: an index into `categories`
    categories: tuple[str, ...] = ()


class SourceImage(NamedTuple):
    """One image of a collection."""

    name: str  # path of the file relative to the source, with forward slashes
    file: File
    attributes: tuple[float, ...] = ()  # in the order of the layout's attributes


class Images(Sequence[SourceImage]):
    """Images that are made when they are asked for, so that a million of them take a few bytes each."""

    def __init__(self, rows: Int[np.ndarray, " n"], make: Callable[[int], SourceImage]) -> None:
        """Image i is `make(rows[i])`."""
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Images(self._rows[index], self._make)
        return self._make(int(self._rows[index]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A collection of images, in the order in which it is written."""

    kind: str  # a key of prepare.LAYOUTS
    source: str  # name of the folder, .zip file or TFDS dataset, without the folders above it
    splits: Mapping[str, Sequence[SourceImage]]  # none is empty
    attributes: tuple[Attribute, ...] = ()
    crop: Crop = CENTER_SQUARE
    notes: tuple[str, ...] = ()  # for the user, one line each


def splits_of(
    listing: Listing,
    splits: Mapping[str, Int[np.ndarray, " n"]],
    *,
    prefix: str = "",
    values: Float32[np.ndarray, "m a"] | None = None,
) -> dict[str, Sequence[SourceImage]]:
    """The splits that have images, of the files of a listing, whose attributes are `values`.

    `splits` has the rows of each split, and `prefix` what stands before the files' names: `thumbnails128x128/`.
    """
    make = functools.partial(_image, listing, prefix, values)
    return {name: Images(rows, make) for name, rows in splits.items() if len(rows)}


def _image(listing: Listing, prefix: str, values: Float32[np.ndarray, "m a"] | None, row: int) -> SourceImage:
    labels = () if values is None else tuple(values[row].tolist())
    return SourceImage(f"{prefix}{listing.names[row]}", listing.file(row), labels)


def guess_layout(source: Source) -> str | None:
    """The dataset whose folders a source has, if any."""
    if source.path.name in FFHQ_FOLDERS or any(map(source.has_folder, FFHQ_FOLDERS)):
        return "ffhq"
    if any(map(source.has_folder, CELEBA_FOLDERS)):
        return "celeba"
    return None


def wrong_source(source: Source, *, expected: str, layout: str, remedy: str = "", inside: str = "") -> UserError:
    """The error for a source, or the folder `inside` it, that is not what its layout expects.

    By default the remedy is a command with the layout that fits.
    """
    fitting = guess_layout(source) or "folder"
    if not remedy:
        kind, where = (fitting, source.path) if fitting != layout else (layout, "DIR")
        remedy = f"try python -m facevae_jax.prepare --layout={kind} --source={where} --resolution=64"
    path = source.path / inside if inside else source.path
    return UserError(f"--source={str(path)!r}: expected {expected}, {source.describe(inside)}: {remedy}.")
