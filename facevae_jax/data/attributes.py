"""Labels of one's own: a CSV or JSON file that is joined to the images of any layout by file name."""

import collections
import csv
import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.data.layouts import UNKNOWN, Attribute, Images, Layout, SourceImage
from facevae_jax.errors import UserError, some

SUFFIXES = (".csv", ".json", ".jsonl")
FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "name", "path")  # the first column otherwise
UNKNOWN_WORDS = ("", "na", "n/a", "nan", "null", "none", "?")
BINARY_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
MAX_CATEGORIES = 256  # a column with more different texts describes, it does not classify


class Table(NamedTuple):
    """Labels by file name."""

    attributes: tuple[Attribute, ...]
    rows: dict[str, int]  # file name -> row of `values`
    values: Float32[np.ndarray, "n a"]  # NaN where unknown
    notes: tuple[str, ...]

    def find(self, name: str) -> str | None:
        """The entry of an image: by its path relative to the source, its file name, or that without extension."""
        path = pathlib.PurePosixPath(name)
        return next((key for key in (name, path.name, path.stem) if key in self.rows), None)


def join_table(layout: Layout, path: pathlib.Path) -> Layout:
    """The layout with the table's attributes after its own; those of images that are not in the table are unknown.

    Raises:
      UserError: the table cannot be read, no row is an image's or one is several images', or it has an attribute that
        the layout has already.
    """
    table = read_table(path)
    taken = {attribute.name for attribute in layout.attributes}
    if twice := [attribute.name for attribute in table.attributes if attribute.name in taken]:
        raise UserError(f"{_flag(path)}: the images have an attribute {twice[0]!r} already: name the column otherwise.")
    used: dict[str, str] = {}
    missing, total = [], 0
    for image in (image for images in layout.splits.values() for image in images):
        total += 1
        key = table.find(image.name)
        if key is None:
            missing.append(image.name)
        elif key in used:
            raise UserError(
                f"{_flag(path)}: the row {key!r} fits {used[key]!r} and {image.name!r}: write paths relative to "
                "--source in that column."
            )
        else:
            used[key] = image.name
    if not used:
        raise UserError(
            f"{_flag(path)}: no row fits an image; rows: {some(table.rows)}; images: {some(missing)}: write the files' "
            "names into the first column."
        )
    notes = list(table.notes)
    if unused := [key for key in table.rows if key not in used]:
        notes.append(f"{len(unused)} of {len(table.rows)} rows of {path.name} fit no image ({some(unused)}).")
    if missing:
        notes.append(f"{len(missing)} of {total} images are not in {path.name} ({some(missing)}): unknown there.")
    return dataclasses.replace(
        layout,
        splits={split: _joined(images, table) for split, images in layout.splits.items()},
        attributes=layout.attributes + table.attributes,
        notes=(*layout.notes, *notes),
    )


def _joined(images: Sequence[SourceImage], table: Table) -> Images:
    return Images(np.arange(len(images)), functools.partial(_join_image, images, table))


def _join_image(images: Sequence[SourceImage], table: Table, row: int) -> SourceImage:
    image = images[row]
    key = table.find(image.name)
    labels = [UNKNOWN] * len(table.attributes) if key is None else table.values[table.rows[key]].tolist()
    return image._replace(attributes=(*image.attributes, *labels))


def read_table(path: pathlib.Path) -> Table:
    """Reads a CSV file with a line of column names, a JSON list of objects or object of objects, or JSON lines.

    The file's name is in the column `file`, `image`, `name` or the like, otherwise in the first; of an object of
    objects it is the key. A column of 0 and 1, -1 and 1, true and false or yes and no is binary, one of other numbers
    continuous, any other categorical. Empty fields, NA and null are unknown.

    Raises:
      UserError: the file cannot be read, names an image twice or no attribute.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".csv":
            records = _csv_records(text)
        elif path.suffix.lower() == ".jsonl":
            records = _named(json.loads(line) for line in text.splitlines() if line.strip())
        else:
            records = _named(json.loads(text))
    except (OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(
            f"{_flag(path)} cannot be read ({reason}): give a CSV file with a line of column names, or a JSON list of "
            "objects."
        ) from error
    if not records:
        raise UserError(f"{_flag(path)} has no rows: give one for each image.")
    counts = collections.Counter(name for name, _ in records)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{_flag(path)} has several rows for {some(map(repr, twice))}: leave one of each.")
    columns = list(dict.fromkeys(column for _, fields in records for column in fields))
    attributes, values, notes = [], [], []
    for column in columns:
        if not column or "/" in column:
            raise UserError(f"{_flag(path)}: {column!r} cannot be the name of an attribute: it must not have a slash.")
        found = _column(column, [fields.get(column) for _, fields in records])
        if found is None:
            notes.append(f"the column {column!r} of {path.name} has over {MAX_CATEGORIES} different texts: left out.")
            continue
        attributes.append(found[0])
        values.append(found[1])
    if not attributes:
        raise UserError(
            f"{_flag(path)} has no attributes: give a column for each beside the files' names, with commas between."
        )
    rows = {name: row for row, (name, _) in enumerate(records)}
    return Table(tuple(attributes), rows, np.stack(values, axis=1), tuple(notes))


def _flag(path: pathlib.Path) -> str:
    return f"--attributes={str(path)!r}"


def _csv_records(text: str) -> list[tuple[str, dict[str, Any]]]:
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, the first {len(header)}")
    if len(set(header)) < len(header):
        raise ValueError("two columns have one name")
    return _named(dict(zip(header, row, strict=True)) for row in rows)


def _named(content: Any) -> list[tuple[str, dict[str, Any]]]:
    """The name of the file and the other fields of every record."""
    if isinstance(content, dict):
        records = list(content.items())
    else:
        records = []
        for fields in content:
            key = next((column for column in fields if column.lower() in FILE_COLUMNS), next(iter(fields), ""))
            if not key:
                raise ValueError("an object is empty")
            records.append((fields[key], {column: value for column, value in fields.items() if column != key}))
    if not all(isinstance(name, str) and isinstance(fields, dict) for name, fields in records):
        raise ValueError("expected an object with the name of a file for each image")
    return [(name.strip().removeprefix("./"), fields) for name, fields in records]


def _column(name: str, fields: Iterable[Any]) -> tuple[Attribute, Float32[np.ndarray, " n"]] | None:
    """One column as numbers; None where it is free text."""
    words = ["" if field is None else str(field).strip() for field in fields]
    known = {word for word in words if word.lower() not in UNKNOWN_WORDS}
    numbers = {word: _number(word) for word in known}
    if all(value is not None for value in numbers.values()):
        meanings: dict[str, float] = {word: value for word, value in numbers.items() if value is not None}
        distinct = set(meanings.values())
        if distinct <= {-1.0, 1.0}:  # CelebA writes no as -1
            meanings = {word: max(value, 0.0) for word, value in meanings.items()}
        attribute = Attribute(name, "binary" if distinct <= {-1.0, 1.0} or distinct <= {0.0, 1.0} else "continuous")
    elif len(known) > MAX_CATEGORIES:
        return None
    else:
        categories = tuple(sorted(known))
        meanings = {word: float(number) for number, word in enumerate(categories)}
        attribute = Attribute(name, "categorical", categories)
    return attribute, np.array([meanings.get(word, UNKNOWN) for word in words], np.float32)


def _number(word: str) -> float | None:
    """The number that a word is, truth values included; None where it is none, or not finite in float32."""
    if word.lower() in BINARY_WORDS:
        return BINARY_WORDS[word.lower()]
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(np.float32(value)) else None
