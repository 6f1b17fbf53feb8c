"""Prepared datasets: finding one, and reading it without TensorFlow.

A dataset lies in `data_dir/NAME/RESOLUTION/VERSION/`: ArrayRecord files by split, whose row i is the i-th image in the
order of the layout, with the features `image` (PNG), `name` and, where the layout has any, `attributes` (float32; NaN
where unknown).
"""

import functools
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from facevae_jax.data import records
from facevae_jax.data.locations import location
from facevae_jax.data.parallel import map_in_order
from facevae_jax.errors import UserError, expand_home

VERSION = "1.0.0"
CHECKSUMS = "checksums.json"  # of the dataset: bytes and SHA-256 of every ArrayRecord file, by name
READ_ROWS = 16  # rows fetched and decoded together


def dataset_directory(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> pathlib.Path:
    """Where this version of the project writes the dataset; `data_dir` may be a URL (see `locations.location`)."""
    return location(data_dir) / name / str(resolution) / VERSION


def is_published(directory: pathlib.Path) -> bool:
    """Whether there is a dataset.

    Raises:
      UserError: that cannot be found out.
    """
    try:
        return (directory / records.INFO_FILE).is_file()
    except Exception as error:  # the library of each object store raises its own kinds; ImportError without one
        raise UserError(
            f"{directory} cannot be read ({records.reason(error)}): check its name and your rights, and of a URL that "
            "its library is installed (gcsfs for gs://, s3fs for s3://, adlfs for az://)."
        ) from error


def prepared_datasets(data_dir: str | os.PathLike[str]) -> dict[str, dict[int, pathlib.Path]]:
    """The newest version of every prepared dataset under `data_dir`, by name and resolution.

    The remains of a run that was killed are not among them.
    """
    found: dict[str, dict[int, tuple[tuple[int, ...], pathlib.Path]]] = {}
    for info in sorted(expand_home(data_dir, name="data_dir").glob(f"*/*/*/{records.INFO_FILE}")):
        directory = info.parent
        name, resolution, version = directory.parts[-3:]
        if re.fullmatch(r"\d+\.\d+\.\d+", version) and resolution.isdecimal():
            candidate = (tuple(map(int, version.split("."))), directory)
            resolutions = found.setdefault(name, {})
            resolutions[int(resolution)] = max(candidate, resolutions.get(int(resolution), candidate))
    return {name: {size: path for size, (_, path) in sorted(sizes.items())} for name, sizes in found.items()}


def find_dataset(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> pathlib.Path:
    """The directory of the newest version of a prepared dataset.

    Raises:
      UserError: it is not prepared, or not at this resolution.
    """
    datasets = prepared_datasets(data_dir)
    if resolution in datasets.get(name, {}):
        return datasets[name][resolution]
    prepare = (
        f"python -m facevae_jax.prepare --layout=... --source=... --name={name} "
        f"--resolution={resolution} --data_dir={data_dir}"
    )
    if name in datasets:
        sizes = list(datasets[name])
        raise UserError(
            f"config.data.resolution={resolution}: {name!r} is prepared in config.data.data_dir={str(data_dir)!r} at "
            f"{', '.join(map(str, sizes))}: use --config.data.resolution={sizes[-1]}, or prepare it: {prepare}"
        )
    known = f"there are: {', '.join(datasets)}" if datasets else "no dataset is prepared there"
    raise UserError(
        f"config.data.name={name!r} (config.data.resolution={resolution}) is not prepared in "
        f"config.data.data_dir={str(data_dir)!r}; {known}: prepare it: {prepare}"
    )


def split_sizes(directory: pathlib.Path) -> dict[str, int]:
    """The number of images in every split of a prepared dataset.

    Raises:
      UserError: the dataset cannot be read.
    """
    return {name: split.num_examples for name, split in records.open_info(directory).info.splits.items()}


def read_metadata(directory: pathlib.Path) -> dict[str, Any]:
    """What `prepare_dataset` noted about where the images come from, and `attributes`: their names and kinds.

    Raises:
      UserError: the dataset cannot be read.
    """
    try:
        return json.loads((directory / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no readable metadata.json: prepare the dataset anew.") from error


def fingerprint(directory: pathlib.Path) -> str:
    """Text that is another as soon as an image or a label is: the checksums of a prepared dataset's files.

    Raises:
      UserError: the dataset cannot be read.
    """
    try:
        return (directory / CHECKSUMS).read_text()
    except FileNotFoundError:  # a version that kept none wrote it
        return json.dumps(read_metadata(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no readable {CHECKSUMS}: prepare the dataset anew.") from error


def read_images(directory: pathlib.Path, split: str, rows: range | None = None) -> Iterator[UInt8[np.ndarray, "r r 3"]]:
    """The images of a split, in row order.

    Args:
      directory: of the dataset.
      split: its name.
      rows: consecutive rows, of which alone the files are needed; None: all.

    Raises:
      UserError: the split is not there, or cannot be read.
    """
    decode = functools.partial(_decode, directory=directory, split=split)
    return _read(directory, split, decode, rows)


def _decode(example: bytes, *, directory: pathlib.Path, split: str) -> UInt8[np.ndarray, "r r 3"]:
    try:
        with Image.open(io.BytesIO(records.feature_bytes(example, "image")), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow and protobuf raise many kinds for damaged bytes
        raise UserError(
            f"{directory}: the split {split!r} has a damaged image ({records.reason(error)}): prepare it anew."
        ) from error


def _read(
    directory: pathlib.Path, split: str, decode: Callable[[bytes], Any], rows: range | None = None
) -> Iterator[Any]:
    """`decode` of serialized examples of a split in row order, decoded by threads: Pillow releases the GIL."""
    source = records.open_split(pathlib.Path(directory), split, rows)
    wanted = range(len(source)) if rows is None else rows

    def decode_rows(start: int) -> list[Any]:
        try:
            examples = source.__getitems__(wanted[start : start + READ_ROWS])
        except Exception as error:  # array_record raises several kinds
            raise UserError(
                f"{directory}: the split {split!r} cannot be read ({records.reason(error)}): prepare the dataset anew."
            ) from error
        return [decode(example) for example in examples]

    starts = range(0, len(wanted), READ_ROWS)
    for results in map_in_order(decode_rows, starts, threads=os.cpu_count() or 1):
        yield from results


def read_attributes(directory: pathlib.Path, split: str) -> dict[str, Float32[np.ndarray, " n"]]:
    """The attributes of a split by name, in row order; NaN where unknown. Empty where the dataset has none.

    Raises:
      UserError: the split is not there, or cannot be read.
    """
    names = [attribute["name"] for attribute in read_metadata(directory)["attributes"]]
    if not names:
        return {}

    def values(example: bytes) -> list[float]:
        features = records.features_of(example)
        return [features[f"attributes/{name}"].float_list.value[0] for name in names]

    table = np.fromiter(itertools.chain.from_iterable(_read(directory, split, values)), np.float32)
    table = table.reshape(-1, len(names))
    return {name: table[:, column].copy() for column, name in enumerate(names)}


def read_names(directory: pathlib.Path, split: str) -> list[str]:
    """The names of a split's images, in row order: paths relative to the source that it was prepared from.

    Raises:
      UserError: the split is not there, or cannot be read.
    """
    decode = functools.partial(records.feature_bytes, feature="name")
    return [name.decode("utf-8", "surrogateescape") for name in _read(directory, split, decode)]
