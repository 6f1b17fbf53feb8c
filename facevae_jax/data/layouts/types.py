"""What every layout of a collection of images is made of: images by split, how to crop them, and their labels."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from facevae_jax.core.errors import UserError, some
from facevae_jax.data.sources.images import CENTER_SQUARE, Crop
from facevae_jax.data.sources.names import CELEBA_FOLDERS, FFHQ_FOLDERS
from facevae_jax.data.sources.opening import File, Listing, Source

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What a source may have instead of images, and what to do with it, of some names and the first one's path.
PACKED = (
    (re.compile(r"\.zip$", re.IGNORECASE), "give the archive itself, --source={1}"),
    (re.compile(r"\.(7z|rar|tar|tgz|tar\.\w+)(\.\d+)?$", re.IGNORECASE), "unpack {0} first"),
    (re.compile(r"\.parquet$", re.IGNORECASE), "take --layout=parquet"),
    (re.compile(r"\.(heic|heif|avif|gif|bmp|tiff?|jp2|jxl)$", re.IGNORECASE), "convert {0} to JPEG or PNG"),
)
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
    resize: str = "lanczos"  # a key of `images.RESIZES`
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

    By default the remedy follows from what is there: a layout or a folder that fits, or what to do with the files.
    """
    path = source.path / inside if inside else source.path
    remedy = remedy or _remedy(source, layout)
    return UserError(f"--source={str(path)!r}: expected {expected}, {source.describe(inside)}: {remedy}.")


def _remedy(source: Source, layout: str) -> str:
    """What to do with a source that does not fit a layout."""
    names = source.names()

    def command(layout: str, path: pathlib.Path) -> str:
        return f"try python -m facevae_jax.prepare --layout={layout} --source={path} --resolution=64"

    if (fitting := guess_layout(source)) and fitting != layout:
        return command(fitting, source.path)
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    for folder in folders if source.path.is_dir() else ():
        for kind, known in (("celeba", CELEBA_FOLDERS), ("ffhq", FFHQ_FOLDERS)):
            if any(source.has_folder(f"{folder}/{name}") for name in known):
                return command(kind, source.path / folder)
    for pattern, words in PACKED:
        if found := [name for name in names if pattern.search(name)]:
            packed_twice = "{1}" in words and not source.path.is_dir()
            return ("unpack {0} first" if packed_twice else words).format(some(found), source.path / found[0])
    if layout != "folder":
        return command("folder", source.path)
    return "give the folder or the .zip file that the images are in"
