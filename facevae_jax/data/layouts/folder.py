"""Any folder or .zip file of PNG, JPEG or WebP files, with folders for splits or without."""

import pathlib

import numpy as np
from jaxtyping import Int64

from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.layouts.types import (
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    Layout,
    guess_layout,
    splits_of,
    wrong_source,
)
from facevae_jax.data.sources.opening import Listing, list_files, open_source

SPLIT_FOLDERS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing"),
}


def folder_layout(path: pathlib.Path) -> Layout:
    """All images in `path`, in the splits of folders such as train/, val/ and test/, where all are in one of these.

    Else, or without a folder for validation, about a tenth is for that, chosen by the hash of the name.

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
    return Layout(
        kind="folder",
        source=path.name,
        splits=splits_of(listing, splits),
        notes=tuple(filter(None, (*source.notes, listing.ignored_note, hint if fitting else "", note))),
    )


def _splits(listing: Listing, rows: Int64[np.ndarray, " n"]) -> tuple[dict[str, Int64[np.ndarray, " m"]], str]:
    """The rows of each split, and a line that says where they come from if folders decide it."""
    tops = [listing.names[row].partition("/")[0].lower() if "/" in listing.names[row] else "" for row in rows]
    named = [next((split for split, names in SPLIT_FOLDERS.items() if top in names), "") for top in tops]
    by_folder = {split: rows[np.array(named) == split] for split in SPLITS}
    if "" in named or not len(by_folder[TRAIN]) or len({*named}) == 1:
        return hold_out(rows, listing.names.__getitem__), ""
    note = f"the folders {', '.join(sorted({*tops}))} are kept as splits."
    if not len(by_folder[VALIDATION]) and len(by_folder[TRAIN]) > 1:
        by_folder |= hold_out(by_folder[TRAIN], listing.names.__getitem__)
        note += " None is for validation: a tenth of the training images is."
    return by_folder, note
