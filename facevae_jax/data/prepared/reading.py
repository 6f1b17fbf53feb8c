"""Reading TFDS datasets in ArrayRecord files without TensorFlow, and finding prepared ones.

A prepared dataset is in `data_dir/NAME/RESOLUTION/VERSION/`: ArrayRecord files by split, whose row i is the i-th image
in the order of the layout, with the features `image` (PNG), `name` and, if the layout has any, `attributes` (float32;
NaN where unknown).

TFDS is imported where it is used: drawn faces work where it is not installed.
"""

import functools
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import AnyPath, reason
from facevae_jax.core.parallel import map_in_order
from facevae_jax.data.prepared.locations import location, reaching

INFO_FILE = "dataset_info.json"  # without which a folder is not a dataset
VERSION = "1.0.0"
CHECKSUMS = "checksums.json"  # of the dataset: bytes and SHA-256 of every ArrayRecord file, by name
READ_ROWS = 16  # rows fetched and decoded together


def import_tfds() -> Any:
    """Imports TFDS, without its progress bars. Raises UserError: it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("prepared datasets need TFDS: pip install tensorflow-datasets array_record.") from error
    tfds.disable_progress_bar()
    return tfds


class Record(NamedTuple):
    """Where one example of a TFDS dataset is."""

    directory: pathlib.Path
    split: str
    row: int

    def read(self) -> bytes:
        """The encoded image."""
        return feature_bytes(self.example(), "image")

    def example(self) -> bytes:
        """The serialized example; the split stays open for the next."""
        return _cached_split(self.directory, self.split)[self.row]

    def stamp(self) -> tuple[int, ...]:
        """Numbers that change when the dataset does."""
        status = (self.directory / INFO_FILE).stat()
        return status.st_size, status.st_mtime_ns, self.row


def newest_version(folders: Iterable[AnyPath]) -> AnyPath | None:
    """Of folders that are called 1.10.0 or the like and hold a dataset, the one with the highest number."""
    versions = {
        tuple(map(int, folder.name.split("."))): folder
        for folder in folders
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / INFO_FILE).is_file()
    }
    return versions[max(versions)] if versions else None


def open_info(directory: AnyPath) -> Any:
    """The TFDS builder of the dataset in `directory`.

    Raises UserError: the description of the dataset cannot be read, or TFDS is not installed.
    """
    tfds = import_tfds()
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds for a damaged description
        raise UserError(f"{directory} is not a readable dataset ({reason(error)}): prepare it again.") from error


def open_files(paths: Sequence[str | os.PathLike[str]]) -> Any:
    """The records of ArrayRecord files, by row; several rows by `__getitems__`. Raises various errors for damage."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([os.fspath(path) for path in paths])


def open_split(directory: AnyPath, split: str) -> Any:
    """The serialized examples of `split`, as `open_files`. Raises UserError: it is missing or damaged."""
    splits = open_info(directory).info.splits
    if split not in splits:
        raise UserError(f"{directory} has no split {split!r}: its splits are: {', '.join(sorted(splits)) or 'none'}.")
    try:
        source = open_files(splits[split].filepaths)
        source[0]
    except Exception as error:  # array_record raises RuntimeError, ValueError and others
        raise UserError(
            f"{directory}: the split {split!r} cannot be read ({reason(error)}): prepare it again."
        ) from error
    return source


_cached_split = functools.lru_cache(maxsize=8)(open_split)


def features_of(example: bytes) -> Any:
    """The mapping from feature names to `tf.train.Feature` messages of a serialized example."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(example).features.feature


def feature_bytes(example: bytes, feature: str) -> bytes:
    """One bytes feature of a serialized example."""
    return features_of(example)[feature].bytes_list.value[0]


def decode_image(example: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The image of a serialized example. Raises various errors for damaged bytes, and ValueError for other modes."""
    with Image.open(io.BytesIO(feature_bytes(example, "image")), formats=["PNG"]) as image:
        if image.mode != "RGB":
            raise ValueError(f"the mode is {image.mode}, not RGB")
        return np.array(image)


def dataset_directory(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> AnyPath:
    """Where this version of the project writes the dataset; `data_dir` may be a URL (see `locations.location`)."""
    return location(data_dir, name="--data_dir") / name / str(resolution) / VERSION


def is_published(directory: AnyPath) -> bool:
    """Whether there is a dataset. Raises UserError: the folder or URL cannot be read."""
    with reaching(directory, name="--data_dir"):
        return (directory / INFO_FILE).is_file()


def prepared_datasets(data_dir: AnyPath) -> dict[str, dict[int, AnyPath]]:
    """The newest version of every prepared dataset under `data_dir`, by name and resolution.

    The remains of a run that was killed are not among them.
    """
    found: dict[str, dict[int, AnyPath]] = {}
    for name in _folders(data_dir):
        for resolution in _folders(name):
            if resolution.name.isdecimal() and (newest := newest_version(_folders(resolution))):
                found.setdefault(name.name, {})[int(resolution.name)] = newest
    return {name: dict(sorted(sizes.items())) for name, sizes in found.items()}


def _folders(folder: AnyPath) -> list[AnyPath]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def find_dataset(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> AnyPath:
    """The directory of the newest version of a prepared dataset; `data_dir` may be a URL.

    Raises UserError: it is not prepared, or not at this resolution.
    """
    root = location(data_dir, name="config.data.data_dir")
    if newest := newest_version(_folders(root / name / str(resolution))):
        return newest
    datasets = prepared_datasets(root)
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


def split_sizes(directory: AnyPath) -> dict[str, int]:
    """The number of images in every split of a prepared dataset. Raises UserError: the dataset cannot be read."""
    return {name: split.num_examples for name, split in open_info(directory).info.splits.items()}


def read_metadata(directory: AnyPath) -> dict[str, Any]:
    """The source of the images, and `attributes`: their names and kinds. Raises UserError: they cannot be read."""
    try:
        return json.loads((directory / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no readable metadata.json: prepare the dataset again.") from error


def fingerprint(directory: AnyPath) -> str:
    """Text that differs as soon as an image or a label does: the checksums of a prepared dataset's files.

    Raises UserError: the dataset cannot be read.
    """
    try:
        return (directory / CHECKSUMS).read_text()
    except FileNotFoundError:  # written by a version without checksums
        return json.dumps(read_metadata(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no readable {CHECKSUMS}: prepare the dataset again.") from error


def read_images(directory: AnyPath, split: str) -> Iterator[UInt8[np.ndarray, "r r 3"]]:
    """The images of a split, in row order. Raises UserError: the split is not there, or cannot be read."""
    return _read(directory, split, decode_image)


def _read(directory: AnyPath, split: str, decode: Callable[[bytes], Any]) -> Iterator[Any]:
    """`decode` of serialized examples of a split in row order, decoded by threads: Pillow releases the GIL."""
    source = open_split(pathlib.Path(directory), split)

    def decode_rows(start: int) -> list[Any]:
        try:
            examples = source.__getitems__(range(start, min(start + READ_ROWS, len(source))))
            return [decode(example) for example in examples]
        except Exception as error:  # array_record, Pillow and protobuf raise many kinds
            raise UserError(
                f"{directory}: the split {split!r} cannot be read ({reason(error)}): prepare it again."
            ) from error

    blocks = map_in_order(decode_rows, range(0, len(source), READ_ROWS), threads=os.cpu_count() or 1)
    return itertools.chain.from_iterable(blocks)


def read_attributes(directory: AnyPath, split: str, names: Sequence[str]) -> Float32[np.ndarray, "n a"]:
    """Some attributes of a split, one or more, in row order; NaN where unknown.

    Raises UserError: the split is not there, or cannot be read.
    """

    def values(example: bytes) -> list[float]:
        features = features_of(example)
        return [features[f"attributes/{name}"].float_list.value[0] for name in names]

    return np.fromiter(_read(directory, split, values), np.dtype((np.float32, (len(names),))))


def read_names(directory: AnyPath, split: str) -> list[str]:
    """The names of a split's images: paths relative to their source. Raises UserError: they cannot be read."""
    return list(_read(directory, split, lambda example: os.fsdecode(feature_bytes(example, "name"))))
