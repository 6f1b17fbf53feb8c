"""Any folder or .zip file of PNG, JPEG or WebP files, with folders for splits or without."""

import dataclasses
import pathlib
import re
import zipfile
import zlib

import numpy as np
from jaxtyping import Float32, Int64

from facevae_jax.core.errors import UserError, some
from facevae_jax.data.layouts.label_files import MAX_CATEGORIES, join_table
from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.layouts.types import (
    SPLITS,
    TEST,
    TRAIN,
    UNKNOWN,
    VALIDATION,
    Attribute,
    Layout,
    guess_layout,
    splits_of,
    wrong_source,
)
from facevae_jax.data.sources.opening import Listing, Source, list_files, open_source

SPLIT_FOLDERS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "dev", "eval", "evaluation"),
    TEST: ("test", "testing"),
}
AFTER_SPLIT = re.compile(r"[-_ ]?(images?|imgs?|faces?|set|data|split)$")  # of the name of a split's folder
PART_DIGITS = 4  # of the names of folders that only divide a large collection
CLASS = "class"  # the attribute that folders are
STYLEGAN_LABELS = "dataset.json"


def folder_layout(path: pathlib.Path, *, labeled: bool = False) -> Layout:
    """All images in `path`, in the splits of folders such as train/, images/val/ and test_images/, if each is in one.

    Else, or without a folder for validation, about a tenth is for that, chosen by the hash of the name. Where each
    image is in one of a few folders with names, these are the attribute `class`, and StyleGAN's `dataset.json` is the
    attribute `label`, unless the images are `labeled` by a table of the user's.

    Raises UserError: there is no such source, or no image in it.
    """
    source = open_source(path)
    listing = list_files(source)
    rows = listing.image_rows
    if not len(rows):
        raise wrong_source(source, expected="PNG, JPEG or WebP files", layout="folder")
    fitting = guess_layout(source)
    hint = f"this folder fits --layout={fitting}, which knows its splits and attributes."
    splits, note = _splits(listing, rows)
    attributes, values, classes = _classes(listing, labeled=labeled)
    layout = Layout(
        kind="folder",
        source=path.name,
        splits=splits_of(listing, splits, values=values),
        attributes=attributes,
        notes=tuple(filter(None, (*source.notes, listing.ignored_note, hint if fitting else "", note, classes))),
    )
    return layout if labeled else _with_stylegan_labels(layout, source)


def _with_stylegan_labels(layout: Layout, source: Source) -> Layout:
    """The layout with the labels of a `dataset.json`, or with a note where it has none for these images."""
    try:
        content = source.read(STYLEGAN_LABELS)
        if content is None or b'"labels"' not in content:  # there is none, or it is something else
            return layout
        joined = join_table(layout, source.path / STYLEGAN_LABELS, content)
        return dataclasses.replace(joined, notes=(*joined.notes, f"{STYLEGAN_LABELS} is read: it has their labels."))
    except (UserError, OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(STYLEGAN_LABELS)[2].lstrip("': ") or str(error)
        note = f"the labels of {STYLEGAN_LABELS} are left out: {reason}"
        return dataclasses.replace(layout, notes=(*layout.notes, note))


def _classes(listing: Listing, *, labeled: bool) -> tuple[tuple[Attribute, ...], Float32[np.ndarray, "n a"], str]:
    """The attribute of folders for classes, its value for each file of the listing, and a line that says so."""
    nothing = (), np.empty((len(listing.names), 0), np.float32), ""
    folders = [listing.names[row].split("/")[:-1] for row in listing.image_rows]
    for parts in folders:
        if split := next(filter(split_named, parts), ""):
            parts.remove(split)
    names = sorted({"/".join(parts) for parts in folders} - {""})
    if labeled or len(names) < 2 or any(len(parts) > 1 for parts in folders):
        return nothing
    numbers = any(name.isdecimal() for name in names)
    why = f"there are over {MAX_CATEGORIES}" if len(names) > MAX_CATEGORIES else ""
    why = why or ("some of their names are numbers" if numbers else "")
    why = why or ("some images are outside of them" if [] in folders else "")
    if why:
        parts_of_one = numbers and all(len(name) >= PART_DIGITS for name in names)  # such as FFHQ's 00000, 01000
        return *nothing[:2], "" if parts_of_one else f"the folders {some(names)} are no label {CLASS!r}: {why}."
    values = np.full((len(listing.names), 1), UNKNOWN, np.float32)
    values[listing.image_rows, 0] = [names.index(parts[0]) for parts in folders]
    note = f"the folders {some(names)} are the label {CLASS!r}."
    return (Attribute(CLASS, "categorical", tuple(names)),), values, note


def split_named(word: str) -> str:
    """The split that a folder stands for, such as Val or train_images; empty for others."""
    first = AFTER_SPLIT.sub("", word.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if first in names), "")


def _splits(listing: Listing, rows: Int64[np.ndarray, " n"]) -> tuple[dict[str, Int64[np.ndarray, " m"]], str]:
    """The rows of each split, and a line that says where they come from if folders decide it."""
    deciding = [next(filter(split_named, listing.names[row].split("/")[:-1]), "") for row in rows]
    named = np.array([split_named(part) for part in deciding])
    folders = ", ".join(sorted({*deciding} - {""}))
    by_folder = {split: rows[named == split] for split in SPLITS}
    if "" in named or not len(by_folder[TRAIN]) or len({*named}) == 1:
        outside = [listing.names[row] for row in rows[named == ""]]
        why = f"{len(outside)} images are outside of them ({some(outside)})" if outside else "none is for training"
        ignored = f"the folders {folders} are no splits, since {why}: move these, or a tenth of all is for validation."
        return hold_out(rows, listing.names.__getitem__), ignored if len({*named} - {""}) > 1 else ""
    note = f"the folders {folders} are kept as splits."
    if not len(by_folder[VALIDATION]) and len(by_folder[TRAIN]) > 1:
        by_folder |= hold_out(by_folder[TRAIN], listing.names.__getitem__)
        note += " None is for validation: a tenth of the training images is."
    return by_folder, note
