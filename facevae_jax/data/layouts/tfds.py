"""A dataset of the TFDS catalogue (lfw, celeb_a, ...) that is prepared on this machine, as a layout."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from facevae_jax.core.errors import UserError, expand_home, some
from facevae_jax.core.files import reason
from facevae_jax.data.layouts import types
from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.prepared import reading
from facevae_jax.data.sources.images import CELEBA_CROP, CELEBA_SIZE, CENTER_SQUARE

IMAGE = "image"

Fields = dict[str, tuple[types.Attribute, Callable[[Any], Sequence[float]]]]  # by name in the records


def tfds_layout(source: str, *, data_dir: str | os.PathLike[str]) -> types.Layout:
    """The newest version of a TFDS dataset under `data_dir`, in ArrayRecord files.

    Its splits train, validation and test stay as they are, others are left out; without a `validation` split, a tenth
    of `train` becomes one. Scalar features that are booleans, class labels or floats, at the top or in `attributes`,
    become attributes.

    `source` is `name` or `name/config`.

    Raises UserError: the dataset is not prepared there, or in another file format, or has no 8-bit `image`.
    """
    directory = _find(source, expand_home(data_dir, name="--data_dir"))
    info = reading.open_info(directory).info
    features = dict(info.features.items())  # a FeaturesDict is no Mapping
    image = features.get(IMAGE)
    if image is None or len(image.shape) != 3 or np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"--source={source!r} has no 8-bit feature `image` ({some(features)}): choose another.")
    if types.TRAIN not in info.splits:
        raise UserError(f"--source={source!r} has no split `train` ({some(info.splits)}): choose another.")
    fields = _attribute_fields(features)
    splits: dict[str, types.Images] = {}
    for split in (split for split in types.SPLITS if split in info.splits):
        make = functools.partial(_image, directory, split, fields)
        splits[split] = types.Images(np.arange(len(reading.open_split(directory, split))), make)
    notes = []
    if types.VALIDATION not in splits:
        rows_of = hold_out(np.arange(len(splits[types.TRAIN])), functools.partial(_name, types.TRAIN))
        for split, rows in rows_of.items():
            splits[split] = types.Images(rows, functools.partial(_image, directory, types.TRAIN, fields))
        notes.append(f"{source} has no validation split: a tenth of its train split becomes one.")
    return types.Layout(
        kind="tfds",
        source=source,
        splits={split: splits[split] for split in types.SPLITS if splits.get(split)},
        attributes=tuple(attribute for attribute, _ in fields.values()),
        crop=CELEBA_CROP if image.shape[1::-1] == CELEBA_SIZE else CENTER_SQUARE,
        notes=tuple(notes),
    )


def _name(split: str, row: int) -> str:
    return f"{split}/{row:06d}"


def _image(directory: pathlib.Path, split: str, fields: Fields, row: int) -> types.SourceImage:
    record = reading.Record(directory, split, row)
    return types.SourceImage(_name(split, row), record, _labels(record.example(), fields) if fields else ())


def _find(source: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The directory of the newest version of a dataset in ArrayRecord format."""
    name, _, config = source.partition("/")
    folder = data_dir / name
    found: dict[str, pathlib.Path] = {}  # the newest version of each config; "" is that of a dataset without configs
    for place in (folder, *folder.glob("*")) if name else ():
        key = "" if place == folder else place.name
        # A number is the resolution of a dataset that this project prepared.
        if (config or not key.isdecimal()) and (newest := reading.newest_version(place.glob("*"))):
            found[key] = newest
    remedy = (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({source!r}, data_dir={str(data_dir)!r}, '
        "file_format='array_record').download_and_prepare()\" (above 1 GB TFDS needs TensorFlow for this)"
    )
    if config not in found and (config or len(found) != 1):
        if found:
            raise UserError(
                f"--source={source!r}: choose one of {', '.join(f'{name}/{key}'.rstrip('/') for key in sorted(found))}."
            )
        raise UserError(f"--source={source!r}: TFDS has not prepared it in --data_dir={str(data_dir)!r}: {remedy}")
    newest = found[config] if config in found else next(iter(found.values()))
    try:
        file_format = json.loads((newest / reading.INFO_FILE).read_bytes()).get("fileFormat")
    except (OSError, ValueError) as error:
        raise UserError(f"{newest} is not a readable dataset ({reason(error)}): prepare it again.") from error
    if file_format != "array_record":
        raise UserError(
            f"--source={source!r}: {newest} has files in the format {file_format!r}, which need TensorFlow: "
            f"move it away, then {remedy}"
        )
    return newest


def _attribute_fields(features: Mapping[str, Any]) -> Fields:
    """By name in the records: the attribute, and a function that reads its values."""
    nested = features.get("attributes")
    candidates = dict(features)
    if nested is not None and hasattr(nested, "items"):
        candidates |= {f"attributes/{key}": feature for key, feature in nested.items()}
    fields: Fields = {}
    for path, feature in candidates.items():
        if hasattr(feature, "items") or feature.shape != ():
            continue
        name, dtype = path.rpartition("/")[2], np.dtype(feature.np_dtype)
        if categories := tuple(getattr(feature, "names", None) or ()):
            fields[path] = types.Attribute(name, "categorical", categories), lambda value: value.int64_list.value
        elif dtype == np.bool_:
            fields[path] = types.Attribute(name, "binary"), lambda value: value.int64_list.value
        elif np.issubdtype(dtype, np.floating):
            fields[path] = types.Attribute(name, "continuous"), lambda value: value.float_list.value
    return fields


def _labels(example: bytes, fields: Fields) -> tuple[float, ...]:
    features = reading.features_of(example)
    values = (read(features[path]) if path in features else [] for path, (_, read) in fields.items())
    return tuple(float(value[0]) if value else types.UNKNOWN for value in values)
