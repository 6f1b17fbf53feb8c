"""Records of a TFDS dataset in ArrayRecord files, read and written without TensorFlow.

TFDS is imported where it is used: drawn faces work where it is not installed.
"""

import contextlib
import functools
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import AnyPath, reason

INFO_FILE = "dataset_info.json"  # without which a folder is not a dataset


class Record(NamedTuple):
    """Where one example of a TFDS dataset is."""

    directory: str
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
        status = pathlib.Path(self.directory, INFO_FILE).stat()
        return status.st_size, status.st_mtime_ns, self.row


@functools.lru_cache(maxsize=8)
def _cached_split(directory: str, split: str) -> Any:  # of serialized examples
    return open_split(pathlib.Path(directory), split)


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


def import_for_writing() -> None:
    """Imports everything that writing records needs, before threads are started. Raises UserError: it is missing.

    While TFDS is imported it replaces `builtins.__import__` for all threads, and imports by other threads fail: Pillow
    imports a decoder when it meets the first image that needs it, and good images were reported as bad.
    """
    import_tfds()
    from array_record.python import array_record_module  # noqa: F401
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401


@contextlib.contextmanager
def writer(path: AnyPath) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that writes a record into a new ArrayRecord file, which is complete when the block ends."""
    from array_record.python import array_record_module

    # One record a group, so that any can be read alone; PNGs cannot be compressed again.
    opened = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
    try:
        yield opened.write
    finally:
        opened.close()


def encode_example(png: bytes, *, name: bytes, attributes: Mapping[str, float]) -> bytes:
    """A serialized `tf.train.Example` with the features that TFDS reads: image, name, attributes/..."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    features = example.features.feature
    features["image"].bytes_list.value.append(png)
    features["name"].bytes_list.value.append(name)
    for attribute, value in attributes.items():
        features[f"attributes/{attribute}"].float_list.value.append(value)
    # Otherwise the order of the map's entries would change from process to process.
    return example.SerializeToString(deterministic=True)


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


def import_tfds() -> Any:
    """Imports TFDS, without its progress bars. Raises UserError: it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("prepared datasets need TFDS: pip install tensorflow-datasets array_record.") from error
    tfds.disable_progress_bar()
    return tfds
