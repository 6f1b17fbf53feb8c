"""Parquet files of images, as Hugging Face datasets are published."""

import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.core.errors import UserError, describe_entries, some
from facevae_jax.core.files import reason
from facevae_jax.data.layouts.folder import SPLIT_FOLDERS
from facevae_jax.data.layouts.label_files import ABSOLUTE, label_column
from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.layouts.types import SPLITS, TRAIN, UNKNOWN, VALIDATION, Attribute, Images, Layout, SourceImage
from facevae_jax.data.sources.names import canonical, is_debris, what_it_is

SUFFIX = ".parquet"
ROW = "/row"  # a column that no file has: names of labels have no slash
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png", "webp")  # preferred among several


class Shard(NamedTuple):
    """One file."""

    path: str
    column: str  # of the images
    starts: tuple[int, ...]  # the first row of each row group, and the number of rows


class ParquetMember(NamedTuple):
    """One image in a Parquet file."""

    shard: Shard
    row: int

    def read(self) -> bytes:
        """The image file's bytes. Raises a ValueError where there is none."""
        group = int(np.searchsorted(self.shard.starts, self.row, side="right")) - 1
        value = _group(self.shard.path, group, self.shard.column)[self.row - self.shard.starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row has no bytes of an image: the dataset refers to files")
        return data

    def stamp(self) -> tuple[int, ...]:
        """Numbers that change when the file does."""
        status = pathlib.Path(self.shard.path).stat()
        return status.st_size, status.st_mtime_ns, self.row


@functools.lru_cache(maxsize=8)  # rows are read in order, by threads that are near each other
def _group(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def parquet_layout(path: pathlib.Path) -> Layout:
    """A Parquet file, or a folder of them: one column of images, the other scalar columns as attributes.

    The beginning of a file's name, such as train-00000-of-00002.parquet, or its folder is its split; without one for
    validation a tenth is, chosen by the hash of the name.

    Raises UserError: there is no such file, none can be read, or they have no column of images.
    """
    files = _files(path)
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "facevae-jax[parquet]".') from error
    opened, shards, paths, tables = [], [], [], []
    for file in files:
        try:
            one = pyarrow.parquet.ParquetFile(file)
            column = _image_column(one.schema_arrow, file)
            paths += _paths(one, column, file)
            tables.append(_labels(one))
        except (pyarrow.ArrowException, OSError) as error:
            what = what_it_is(file)
            why = what if what and "Parquet" not in what else f"{reason(error)}: download it again"
            raise UserError(f"--source: {file} cannot be read ({why}).") from error
        opened.append(one)
        shards.append(Shard(str(file), column, _starts(one)))
    try:
        labels = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(
            f"--source={str(path)!r}: its files have columns of different kinds ({reason(error)}): give one dataset."
        ) from error
    attributes, values, notes = _attributes(labels, _class_names(opened[0].schema_arrow))
    places = [(shard, row) for shard in shards for row in range(shard.starts[-1])]
    names = _unique(paths)

    def make(row: int) -> SourceImage:
        shard, at = places[row]
        return SourceImage(names[row], ParquetMember(shard, at), tuple(values[row].tolist()))

    of_file = np.repeat(_splits_of(files, path), [shard.starts[-1] for shard in shards])
    rows = {split: np.flatnonzero(of_file == split) for split in SPLITS}
    if not len(rows[VALIDATION]) and len(rows[TRAIN]) > 1:
        rows |= hold_out(rows[TRAIN], names.__getitem__)
    return Layout(
        kind="parquet",
        source=path.name,
        splits={split: Images(rows[split], make) for split in SPLITS if len(rows[split])},
        attributes=attributes,
        notes=tuple(notes),
    )


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a source, sorted. Raises UserError: there is none."""
    if not path.exists():
        raise UserError(f"--source={str(path)!r} does not exist: give a Parquet file, or a folder of them.")
    if path.is_file():
        return [path]
    inside = sorted(path.rglob("*"))
    files = [file for file in inside if file.suffix.lower() == SUFFIX and file.is_file()]
    files = [file for file in files if not is_debris(file.as_posix())]
    if not files:
        entries = sorted(entry.name for entry in path.iterdir())
        raise UserError(
            f"--source={str(path)!r}: expected {SUFFIX} files, {describe_entries(entries)}: give their folder."
        )
    return files


def _labels(file: Any) -> Any:
    """The columns of labels of one file, without dictionaries, which other files may have with other values."""
    import pyarrow as arrow

    names = _label_columns(file.schema_arrow)
    table = file.read(columns=names)
    for place, name in enumerate(names):
        kind = table.schema.field(name).type
        if arrow.types.is_dictionary(kind):
            table = table.set_column(place, name, table.column(name).cast(kind.value_type))
    # A table without columns has no rows for pyarrow.
    rows = arrow.array(np.zeros(file.metadata.num_rows, np.int8))
    return table.append_column(ROW, rows)


def _image_column(schema: Any, path: pathlib.Path) -> str:
    import pyarrow as arrow

    def holds_images(field: Any) -> bool:
        kind = field.type
        if arrow.types.is_struct(kind):
            return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
        return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_images(field)]
    if not found:
        raise UserError(f"--source={str(path)!r}: no column holds images ({some(schema.names)}): give another dataset.")
    return next((name for name in IMAGE_COLUMNS if name in found), found[0])


def _label_columns(schema: Any) -> list[str]:
    import pyarrow as arrow

    kinds = ["boolean", "integer", "floating", "decimal", "string", "large_string", "string_view"]

    def is_label(kind: Any) -> bool:
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        return any(getattr(arrow.types, f"is_{name}")(kind) for name in kinds)

    return [field.name for field in schema if is_label(field.type) and "/" not in field.name]


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of classes that a column's numbers stand for, as the `datasets` library writes them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: of["names"] for name, of in features.items() if isinstance(of, dict) and "names" in of}
    except (KeyError, ValueError, TypeError):
        return {}


def _attributes(
    labels: Any, classes: dict[str, list[str]]
) -> tuple[tuple[Attribute, ...], Float32[np.ndarray, "n a"], list[str]]:
    attributes: list[Attribute] = []
    columns, notes = [np.empty((labels.num_rows, 0), np.float32)], []
    for name in labels.column_names:
        if name == ROW:
            continue
        numbers = labels.column(name).to_pylist()
        if name in classes:
            known = [UNKNOWN if n is None or not 0 <= n < len(classes[name]) else float(n) for n in numbers]
            found: Any = Attribute(name, "categorical", tuple(classes[name])), np.array(known, np.float32)
        else:
            found = label_column(name, ["" if n is None else str(n).strip() for n in numbers])
        if found is None:
            notes.append(f"the column {name!r} has too many different texts: left out.")
            continue
        attributes.append(found[0])
        columns.append(found[1][:, None])
    return tuple(attributes), np.concatenate(columns, axis=1), notes


def _paths(file: Any, column: str, path: pathlib.Path) -> list[str]:
    """A name for each row: that of its image's file, if the column knows it."""
    rows = file.metadata.num_rows
    kind = file.schema_arrow.field(column).type
    default = [f"{path.stem}_{row:06d}" for row in range(rows)]
    if not any(getattr(kind, "num_fields", 0) and kind.field(n).name == "path" for n in range(kind.num_fields)):
        return default
    found = [value.as_py() for value in file.read(columns=[f"{column}.path"]).column(0).combine_chunks().field("path")]
    # Of an absolute path the folders say where it was, on another machine.
    plain = [canonical(name or "") for name in found]
    names = [name.rpartition("/")[2] if ABSOLUTE.match(name) else name for name in plain]
    return [name or other for name, other in zip(names, default, strict=True)]


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one is there twice."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{row:06d}_{name}" for row, name in enumerate(names)]


def _starts(file: Any) -> tuple[int, ...]:
    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return tuple(np.concatenate([[0], np.cumsum(counts)]).astype(int).tolist())


def _splits_of(files: Sequence[pathlib.Path], source: pathlib.Path) -> list[str]:
    """The split of each file: by first words such as train-00000-of-00002, or by others, as in partial-test/0000."""
    named = {word: split for split, words in SPLIT_FOLDERS.items() for word in words}

    def split_of(file: pathlib.Path, most: int | None) -> str:
        inside = file.relative_to(source).parts if file != source else (file.name,)
        words = [word for part in inside for word in re.split(r"[-_.]", part.lower())[:most]]
        return next((named[word] for word in words if word in named), TRAIN)

    by_first, by_any = ([split_of(file, most) for file in files] for most in (1, None))
    return by_any if {*by_first} == {TRAIN} and TRAIN in by_any else by_first
