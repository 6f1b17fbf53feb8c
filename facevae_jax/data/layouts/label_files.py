"""The user's own labels: a CSV or JSON file that is joined to the images of any layout by file name."""

import codecs
import collections
import csv
import dataclasses
import functools
import io
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.core.errors import UserError, some
from facevae_jax.core.files import reason
from facevae_jax.data.layouts.types import UNKNOWN, Attribute, Images, Layout, SourceImage
from facevae_jax.data.sources.names import EXTENSIONS, canonical, is_image

SUFFIXES = (".csv", ".json", ".jsonl")
ABSOLUTE = re.compile(r"/|[A-Za-z]:/")  # how the path of a file begins, on Windows too
UNNAMED = re.compile(r"Unnamed: [\d.]+")  # what pandas calls a column without a name
# Names of the column of files, without spaces and underscores; otherwise it is the first one.
FILE_COLUMNS = ("file", "filename", "filepath", "image", "imageid", "imagepath", "img", "imgpath", "name", "path")
QUOTED = re.compile(r'"[^"]*"')
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")  # 20,5 as Excel writes it in much of Europe
SEPARATOR_LINE = re.compile(r"sep=(.)\s*$", re.IGNORECASE)  # with which Excel begins a file
LARGEST = float(np.finfo(np.float32).max)
UNKNOWN_WORDS = ("", "na", "n/a", "nan", "null", "none", "?")
BINARY_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
SHOWN_ROWS = 100  # by which the column of files is chosen
# How files begin that are no tables.
NO_TABLES = {
    b"PK\x03\x04": "it is an Excel workbook or an archive: save it as CSV",
    b"\xd0\xcf\x11\xe0": "it is an Excel workbook: save it as CSV",
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"<": "it is a page of a web site: download the file itself",
    b"PAR1": "it is a Parquet file: save it as CSV",
}
MAX_CATEGORIES = 256  # a column with more different texts is free text, not a category

Entry = tuple[str, dict[str, Any]]  # the name of a file and its fields


class Table(NamedTuple):
    """Labels by file name."""

    attributes: tuple[Attribute, ...]
    rows: dict[str, int]  # file name -> row of `values`
    values: Float32[np.ndarray, "n a"]  # NaN where unknown
    notes: tuple[str, ...]

    def fit(self, names: Sequence[str]) -> dict[str, str]:
        """The entry of each image that has one, by the image's name.

        An entry may be the path of an image below the source or a longer one, its file's name, one of these without
        the ending or with that of another format, or a path of another machine, whose last part then decides. What
        fits better goes first: an entry is not taken by worse fits.

        Raises:
          ValueError: an entry fits two images alike.
        """
        ends: dict[str, list[str]] = {}  # entries by their last parts without endings
        for entry in self.rows:
            ends.setdefault(_without_ending(entry).rpartition("/")[2], []).append(entry)
        found: dict[str, str] = {}
        for fits in (_is_path, _is_name, _is_path_of_another_format, _is_path_elsewhere):
            used: dict[str, str] = {}
            taken = set(found.values())
            for name in names:
                if name in found:
                    continue
                near = ends.get(_without_ending(name).rpartition("/")[2], [])
                near = [entry for entry in near if entry not in taken and fits(entry, name)]
                if len(near) != 1:
                    continue
                if near[0] in used:
                    raise ValueError(f"the row {near[0]!r} fits {used[near[0]]!r} and {name!r}: write paths")
                used[near[0]] = name
            found |= {name: entry for entry, name in used.items()}
        return found


def _is_path(entry: str, name: str) -> bool:
    return entry == name or entry.endswith(f"/{name}")


def _is_name(entry: str, name: str) -> bool:
    file = name.rpartition("/")[2]
    return entry in (file, _without_ending(file))


def _is_path_of_another_format(entry: str, name: str) -> bool:
    return _is_path(_without_ending(entry), _without_ending(name)) or _without_ending(entry) == _without_ending(
        name.rpartition("/")[2]
    )


def _is_path_elsewhere(entry: str, name: str) -> bool:
    return bool(ABSOLUTE.match(entry)) and entry.rpartition("/")[2] == name.rpartition("/")[2]


def _without_ending(name: str) -> str:
    """a/b for a/b.png; names without an image's ending stay."""
    return name.rpartition(".")[0] if name.lower().endswith(EXTENSIONS) else name


def join_table(layout: Layout, path: pathlib.Path, content: bytes | None = None) -> Layout:
    """The layout with the table's attributes after its own; they are unknown for images that are not in the table.

    Args:
      layout: of the images.
      path: of the table.
      content: of the table, where it is in an archive.

    Raises:
      UserError: the table cannot be read, no row fits an image, one fits several, or the layout has an attribute of the
        same name already.
    """
    table, flag = read_table(path, content), f"--attributes={str(path)!r}"
    taken = {attribute.name for attribute in layout.attributes}
    if twice := [attribute.name for attribute in table.attributes if attribute.name in taken]:
        raise UserError(f"{flag}: the images have an attribute {twice[0]!r} already: rename the column.")
    names = [image.name for images in layout.splits.values() for image in images]
    try:
        entries = table.fit(names)
    except ValueError as error:
        raise UserError(f"{flag}: {error}.") from error
    missing = [name for name in names if name not in entries]
    if not entries:
        raise UserError(
            f"{flag}: no row fits an image: write the files' names, or their paths below the source, into the table; "
            f"rows now: {some(table.rows)}; images: {some(missing)}"
        )
    notes, used = list(table.notes), set(entries.values())
    if unused := [key for key in table.rows if key not in used]:
        notes.append(f"{len(unused)} of {len(table.rows)} rows of {path.name} fit no image ({some(unused)}).")
    if missing:
        notes.append(f"{len(missing)} of {len(names)} images are not in {path.name} ({some(missing)}): unknown there.")
    rows = {name: table.rows[entry] for name, entry in entries.items()}
    return dataclasses.replace(
        layout,
        splits={
            split: Images(np.arange(len(images)), functools.partial(_join_image, images, rows, table.values))
            for split, images in layout.splits.items()
        },
        attributes=layout.attributes + table.attributes,
        notes=(*layout.notes, *notes),
    )


def _join_image(
    images: Sequence[SourceImage], rows: dict[str, int], values: Float32[np.ndarray, "n a"], number: int
) -> SourceImage:
    image = images[number]
    row = rows.get(image.name)
    labels = [UNKNOWN] * values.shape[1] if row is None else values[row].tolist()
    return image._replace(attributes=(*image.attributes, *labels))


def read_table(path: pathlib.Path, content: bytes | None = None) -> Table:
    """Reads a CSV file with a line of column names, a JSON list of objects or object of objects, or JSON lines.

    Fields of a CSV file are between commas, semicolons or tabs; columns without a name, such as a row's number, are
    left out. A `dataset.json` of StyleGAN has one attribute, `label`. Text is UTF-8 or, with a byte order mark, UTF-16.

    The file's name is in the column `file`, `image`, `name` or the like, otherwise in the first; or it is the key.
    A column of 0 and 1, -1 and 1, true and false or yes and no is binary, one of other numbers continuous, any other
    categorical. Empty fields, NA and null are unknown.

    Raises UserError: the file cannot be read, names an image twice, or has no attribute.
    """
    flag = f"--attributes={str(path)!r}"
    try:
        entries = _entries(_text(path.read_bytes() if content is None else content), path.suffix.lower())
    except (OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        remedy = "check its name" if missing else "give a CSV file or a JSON list of objects"
        raise UserError(f"{flag} cannot be read ({reason(error)}): {remedy}.") from error
    if not entries:
        raise UserError(f"{flag} has no rows: give one for each image.")
    counts = collections.Counter(name for name, _ in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{flag} has several rows for {some(map(repr, twice))}: leave one of each.")
    attributes, values, notes = [], [], []
    for column in dict.fromkeys(column for _, fields in entries for column in fields):
        if not column or "/" in column:
            raise UserError(f"{flag}: {column!r} cannot be the name of an attribute: it must not have a slash.")
        words = ["" if fields.get(column) is None else str(fields[column]).strip() for _, fields in entries]
        found = label_column(column, words)
        if found is None:
            notes.append(f"the column {column!r} of {path.name} has over {MAX_CATEGORIES} different texts: left out.")
            continue
        attributes.append(found[0])
        values.append(found[1])
    if not attributes:
        raise UserError(f"{flag} has no attributes: give a column for each beside the files' names.")
    rows = {name: row for row, (name, _) in enumerate(entries)}
    return Table(tuple(attributes), rows, np.stack(values, axis=1), tuple(notes))


def _text(data: bytes) -> str:
    """The text of a file. Raises a ValueError where it is neither UTF-8 nor UTF-16."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if b"\0" in data[:2]:  # UTF-16 of letters without a byte order mark
        return data.decode("utf-16-le" if data[1:2] == b"\0" else "utf-16-be")
    if what := next((what for start, what in NO_TABLES.items() if data.lstrip().startswith(start)), ""):
        raise ValueError(what)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8: save the file as UTF-8") from error


def _csv_rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV file by column; raises a ValueError or csv.Error where it is none."""
    first, _, rest = text.lstrip("\r\n").partition("\n")
    if said := SEPARATOR_LINE.match(first):
        delimiter, text = said[1], rest
    else:
        delimiter = max(",;\t", key=QUOTED.sub("", first).count)  # the comma where there is none
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows = [row for row in lines if any(field.strip() for field in row)]
    if not rows:
        return []
    header, rows = [column.strip() for column in rows[0]], rows[1:]
    if any(map(is_image, header)):
        raise ValueError("its first row is of an image: begin with a row of column names, such as file,smile")
    if delimiter == ";":  # as where the comma is in the numbers
        rows = [
            [field.replace(",", ".") if DECIMAL_COMMA.fullmatch(field.strip()) else field for field in row]
            for row in rows
        ]
    for number, row in enumerate(rows, start=2):
        if len(row) < len(header) or any(row[len(header) :]):
            raise ValueError(f"row {number} has {len(row)} fields, the first {len(header)}")
    named = [place for place, column in enumerate(header) if column and not UNNAMED.fullmatch(column)]
    if len({header[place] for place in named}) < len(named):
        raise ValueError("two columns have one name")
    return [{header[place]: row[place] for place in named} for row in rows]


def _entries(text: str, suffix: str) -> list[Entry]:
    """The names and fields in a file with this ending; raises a ValueError, TypeError or csv.Error for others."""
    if suffix == ".csv":
        content: Any = _csv_rows(text)
    else:
        content = json.loads(text) if suffix == ".json" else list(map(json.loads, filter(str.strip, text.split("\n"))))
        content = _of_stylegan(content)
    if isinstance(content, dict):
        entries = list(content.items())
    else:
        if not all(isinstance(fields, dict) for fields in content):
            raise ValueError("expected an object for each image")
        key = _file_column(content)
        if any(key not in fields for fields in content):
            raise ValueError(f"a row lacks {key!r}, the column of files")
        entries = [
            (fields[key], {column: value for column, value in fields.items() if column != key}) for fields in content
        ]
    if not all(isinstance(name, str) and isinstance(fields, dict) for name, fields in entries):
        raise ValueError("expected an object with the name of a file for each image")
    return [(canonical(name.strip()).removeprefix("./"), fields) for name, fields in entries]


def _file_column(rows: Sequence[dict[str, Any]]) -> str:
    """The column of the files' names: one that is named so and holds names of images, or holds them, or is named so."""
    if not rows:
        return ""
    columns = list(rows[0])
    if not columns:
        raise ValueError("an object is empty")
    named = [column for column in columns if re.sub(r"[ _-]", "", column.lower()) in FILE_COLUMNS]
    shown = rows[:SHOWN_ROWS]
    holding = [column for column in columns if all(is_image(str(row.get(column, "")).strip()) for row in shown)]
    both = [column for column in named if column in holding]
    sure = [column for column in named if column.lower() != "name"]  # which may be a person's
    return (both or sure or holding or named or columns)[0]


def _of_stylegan(content: Any) -> Any:
    """The objects of StyleGAN's `dataset.json`, {"labels": [[name, label], ...]}; any other content as it is."""
    if not (isinstance(content, dict) and set(content) == {"labels"}):
        return content
    pairs = content["labels"]
    if not isinstance(pairs, list) or not pairs:
        raise ValueError("its labels are null: it has none")
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int | float | str) for pair in pairs):
        raise ValueError("its labels are no pairs of a name and a label")
    classes = len({label for _, label in pairs}) > 2  # else binary
    return [{"file": name, "label": f"class {label}" if classes else label} for name, label in pairs]


def label_column(name: str, words: list[str]) -> tuple[Attribute, Float32[np.ndarray, " n"]] | None:
    """One column as numbers; None for free text."""
    known = {word for word in words if word.lower() not in UNKNOWN_WORDS}
    meanings = {word: number for word in known if (number := _number(word)) is not None}
    if len(meanings) == len(known):
        if set(meanings.values()) <= {-1.0, 1.0}:  # CelebA writes no as -1
            meanings = {word: max(value, 0.0) for word, value in meanings.items()}
        attribute = Attribute(name, "binary" if set(meanings.values()) <= {0.0, 1.0} else "continuous")
    elif len(known) > MAX_CATEGORIES:
        return None
    else:
        categories = tuple(sorted(known))
        meanings = {word: float(number) for number, word in enumerate(categories)}
        attribute = Attribute(name, "categorical", categories)
    return attribute, np.array([meanings.get(word, UNKNOWN) for word in words], np.float32)


def _number(word: str) -> float | None:
    """The number that a word stands for, booleans included; None if there is none, or not a finite float32."""
    plain = word.replace("\u2212", "-").removesuffix("%")  # a minus sign, and percent
    try:
        value = BINARY_WORDS[word.lower()] if word.lower() in BINARY_WORDS else float(plain)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None
