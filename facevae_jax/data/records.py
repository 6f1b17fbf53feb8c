"""Records of a TFDS dataset in ArrayRecord files, read without TensorFlow.

TFDS is imported where it is used: synthetic runs work where it is not installed.
"""

import bisect
import contextlib
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from facevae_jax.errors import UserError

INFO_FILE = "dataset_info.json"


class Record(NamedTuple):
    """Where one example of a TFDS dataset is."""

    directory: str
    split: str
    row: int

    def read(self) -> bytes:
        """The encoded image."""
        return feature_bytes(read_record(self.directory, self.split, self.row), "image")

    def stamp(self) -> tuple[int, ...]:
        """Changes where the dataset does."""
        status = pathlib.Path(self.directory, INFO_FILE).stat()
        return status.st_size, status.st_mtime_ns, self.row


@functools.lru_cache(maxsize=8)
def _cached_source(directory: str, split: str) -> Sequence[bytes]:
    return open_split(pathlib.Path(directory), split)


def read_record(directory: str | os.PathLike[str], split: str, row: int) -> bytes:
    """One serialized example of a split, which stays open."""
    return _cached_source(os.fspath(directory), split)[row]


def open_info(directory: pathlib.Path) -> Any:
    """The TFDS builder of the dataset in `directory`.

    Raises:
      UserError: the description of the dataset cannot be read, or TFDS is not installed.
    """
    tfds = import_tfds()
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds for a damaged description
        raise UserError(f"{directory} is not a readable dataset ({reason(error)}): prepare it anew.") from error


class Part:
    """Some files of a split, by the rows of the whole."""

    def __init__(self, paths: Sequence[pathlib.Path], first_row: int) -> None:
        """`first_row` is that of the first file."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._source, self._first = ArrayRecordDataSource(list(map(os.fspath, paths))), first_row

    def __getitem__(self, row: int) -> bytes:
        return self._source[row - self._first]

    def __getitems__(self, rows: Sequence[int]) -> list[bytes]:
        return self._source.__getitems__([row - self._first for row in rows])


def open_split(directory: pathlib.Path, split: str, rows: range | None = None) -> Any:
    """The serialized examples of `split`, by row; batches of rows by `__getitems__`.

    Only the files of `rows`, which are consecutive, need to be there.

    Raises:
      UserError: there is no such split, or its files cannot be read.
    """
    tfds = import_tfds()
    builder = open_info(directory)
    if split not in builder.info.splits:
        found = ", ".join(sorted(builder.info.splits)) or "none"
        raise UserError(f"{directory} has no split {split!r}: its splits are: {found}.")
    try:
        if rows is None:
            source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            source[0]
        else:
            info = builder.info.splits[split]
            shards = shards_of(info.shard_lengths, rows)
            names = sorted(info.filenames)
            paths = [directory / names[number] for number in shards]
            source = Part(paths, sum(info.shard_lengths[: shards.start]))
            source[rows[0]]
    except Exception as error:  # array_record raises RuntimeError or ValueError, TFDS NotImplementedError
        raise UserError(
            f"{directory}: the split {split!r} cannot be read ({reason(error)}): prepare the dataset anew."
        ) from error
    return source


def shards_of(lengths: Sequence[int], rows: range | None) -> range:
    """Of a split's files, with so many rows each, those that hold the consecutive `rows`; all for None."""
    if rows is None:
        return range(len(lengths))
    if not rows:
        return range(0)
    ends = list(itertools.accumulate(lengths))
    return range(bisect.bisect_right(ends, rows[0]), bisect.bisect_right(ends, rows[-1]) + 1)


def import_for_writing() -> None:
    """Imports all that is needed to write records; to be called before threads are started.

    While TFDS is imported it replaces `builtins.__import__` for all threads, and what another thread imports meanwhile
    fails: Pillow imports parts of itself when it meets the first image that needs them, and good images were reported
    as bad ("Relative import statements not supported").

    Raises:
      UserError: TFDS is not installed.
    """
    import_tfds()
    from array_record.python import array_record_module  # noqa: F401
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401


@contextlib.contextmanager
def writer(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Yields what writes a record into a new ArrayRecord file, which is whole when the block has ended."""
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


def feature_bytes(example: bytes, feature: str) -> bytes:
    """One bytes feature of a serialized example."""
    return features_of(example)[feature].bytes_list.value[0]


def features_of(example: bytes) -> Any:
    """The mapping from feature names to `tf.train.Feature` messages of a serialized example."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(example).features.feature


def reason(error: BaseException) -> str:
    """What an exception says, on one line; of the system's errors, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def import_tfds() -> Any:
    """Imports TFDS, without its progress bars.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("prepared datasets need TFDS: pip install tensorflow-datasets array_record.") from error
    tfds.disable_progress_bar()
    return tfds
