"""CelebA, aligned and cropped, as its authors or Kaggle publish it."""

import codecs
import csv
import io
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from facevae_jax.core.errors import UserError, some
from facevae_jax.core.files import reason
from facevae_jax.data.layouts import types
from facevae_jax.data.sources.images import CELEBA_CROP
from facevae_jax.data.sources.names import CELEBA_FOLDERS
from facevae_jax.data.sources.opening import Listing, Source, list_files, open_source

IMAGES, ATTRIBUTES, PARTITION = CELEBA_FOLDERS[0], "list_attr_celeba", "list_eval_partition"
TORCHVISION = "celeba"  # the folder in the one that torchvision is given
SPLIT_NAMES = {"0": types.TRAIN, "1": types.VALIDATION, "2": types.TEST}
LABELS = {"1": 1.0, "-1": 0.0}

UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE

Meaning = TypeVar("Meaning")


def celeba_layout(path: pathlib.Path) -> types.Layout:
    """CelebA: `img_align_celeba/`, `list_attr_celeba.txt` and `list_eval_partition.txt`.

    The two lists may be the CSV files of Kaggle's copy, and the three may be in Img/, Anno/ and Eval/ as in the
    authors' copy. The images may still be in `img_align_celeba.zip`, or everything in one .zip file. The copy with PNG
    files fits the same lists, and all may be in a folder celeba/, as torchvision downloads it.

    Raises UserError: the source is not CelebA, or its lists are damaged or do not name all images.
    """
    source = open_source(path)
    if not _has_images(source) and source.has_folder(TORCHVISION):
        source = open_source(source.path / TORCHVISION) if path.is_dir() else source
    listing, where = _images(source)
    names, labels = _read_list(source, ATTRIBUTES, "Anno", LABELS)
    _, partition = _read_list(source, PARTITION, "Eval", SPLIT_NAMES)
    rows = listing.image_rows
    # In Kaggle's copy the images are one folder deeper.
    files = [pathlib.PurePosixPath(listing.names[row]).stem for row in rows]
    for table, found in ((ATTRIBUTES, labels), (PARTITION, partition)):
        missing = [
            listing.names[row].rpartition("/")[2] for row, file in zip(rows, files, strict=True) if file not in found
        ]
        if missing:
            raise UserError(
                f"--source={str(path)!r}: {len(missing)} of {len(files)} images are not in {table} "
                f"({some(missing)}): download that list again."
            )
    values = np.zeros((len(listing.names), len(names)), np.float32)
    for row, name in zip(rows, files, strict=True):
        values[row] = labels[name]
    split_of = np.array([partition[name][0] for name in files])
    splits = {split: rows[split_of == split] for split in types.SPLITS}
    absent = len(partition) - len(set(files))
    note = f"{absent} of the {len(partition)} images of {PARTITION} are not in {where}: the others are prepared."
    return types.Layout(
        kind="celeba",
        source=path.name,
        splits=types.splits_of(listing, splits, prefix=f"{IMAGES}/", values=values),
        attributes=tuple(types.Attribute(name, "binary") for name in names),
        crop=CELEBA_CROP,
        notes=tuple(filter(None, (*source.notes, listing.ignored_note, note if absent else ""))),
    )


def _has_images(source: Source) -> bool:
    return any(source.has_folder(name) or (source.path / f"{name}.zip").is_file() for name in CELEBA_FOLDERS)


def _images(source: Source) -> tuple[Listing, pathlib.Path]:
    """The image files, and the folder or .zip file that they are in."""
    for name in CELEBA_FOLDERS:
        archive = source.path / f"{name}.zip"
        if source.has_folder(name):
            listing, where = list_files(source, name), source.path / name
        elif archive.is_file():
            inner = open_source(archive)
            listing, where = list_files(inner, IMAGES if inner.has_folder(IMAGES) else ""), archive
        else:
            continue
        if not len(listing.image_rows):
            raise types.wrong_source(source, expected="JPEG files such as 000001.jpg", layout="celeba", inside=name)
        return listing, where
    raise types.wrong_source(source, expected=f"{IMAGES}/", layout="celeba")


def _content(source: Source, name: str) -> bytes | None:
    """The bytes of a list; None where there is none. Raises UserError: it cannot be read."""
    if source.has_folder(name):
        return None
    try:
        return source.read(name)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        remedy = "make it readable" if isinstance(error, PermissionError) else "download it again"
        raise UserError(f"{source.path / name} cannot be read ({reason(error)}): {remedy}.") from error


def _read_list(
    source: Source, stem: str, folder: str, meanings: Mapping[str, Meaning]
) -> tuple[list[str], dict[str, tuple[Meaning, ...]]]:
    """The columns of one of CelebA's lists, and its values by the name of the image's file without extension."""
    # Kaggle's files come down in folders of their own names.
    places = [f"{sub}{stem}{suffix}" for suffix in (".txt", ".csv") for sub in ("", f"{folder}/")]
    places.append(f"{stem}.csv/{stem}.csv")
    name, content = next(((name, data) for name in places if (data := _content(source, name)) is not None), ("", b""))
    if not name:
        remedy = f"put CelebA's {stem}.txt there"
        raise types.wrong_source(source, expected=f"{stem}.txt", layout="celeba", remedy=remedy)
    text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig", "replace")
    lines, is_csv = io.StringIO(text, newline=""), name.endswith(".csv")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = [row for row in (csv.reader(lines, delimiter=delimiter) if is_csv else map(str.split, lines)) if row]
    columns: list[str] = []
    if is_csv:
        columns, rows = rows[0][1:] if rows else [], rows[1:]
    elif stem == ATTRIBUTES:  # a line with the number of images, then the names
        columns, rows = rows[1] if len(rows) > 1 else [], rows[2:]
    width = len(columns) or 1
    values = {}
    for number, (image, *words) in enumerate(rows, start=1):
        if len(words) != width or not all(word in meanings for word in words):
            raise UserError(
                f"{source.path / name}: the entry {number}, {image!r}, lacks {width} known values: download it again."
            )
        values[pathlib.PurePosixPath(image).stem] = tuple(meanings[word] for word in words)
    return columns, values
