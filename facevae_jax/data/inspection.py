"""Reading a prepared dataset that may be damaged: what is wrong is told row by row, and the other rows are read."""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from facevae_jax.config import CHANNELS
from facevae_jax.data import records

# Those of ArrayRecord's own data source: records are read by row, so reading ahead would be lost.
READER_OPTIONS = "readahead_buffer_size:0"
READER_BUFFER_BYTES = 32768
ROWS_TOLD = 5  # first rows of a store that differ


class Row(NamedTuple):
    """One record, as far as it can be read."""

    name: str = ""  # path of the source file
    pixels: UInt8[np.ndarray, "r r 3"] | None = None
    failure: str = ""  # why there are no pixels; empty too where the whole file, or its end, is missing


class RecordFile:
    """One ArrayRecord file, with what keeps it from being read in `failure`."""

    def __init__(self, path: pathlib.Path, *, described: int) -> None:
        """Opens the file, which should hold `described` records."""
        from array_record.python import array_record_module

        self.name = path.name
        self.failure = ""
        self._held = 0
        try:
            self._reader = array_record_module.ArrayRecordReader(
                os.fspath(path), options=READER_OPTIONS, file_reader_buffer_size=READER_BUFFER_BYTES
            )
            self._held = self._reader.num_records()
            if not self._reader.ok():
                self._reader.read([0])  # tells why
        except Exception as error:  # array_record raises RuntimeError, ValueError and others
            self.failure = "is missing" if not path.exists() else f"cannot be read ({records.reason(error)})"
        if not self.failure and self._held != described:
            self.failure = f"holds {self._held} records where {records.INFO_FILE} says {described}"

    def read(self, positions: Sequence[int]) -> list[bytes | Exception | None]:
        """The records at `positions`, or why they cannot be read; None for those that the file does not hold."""
        if any(position >= self._held for position in positions):
            return [None if position >= self._held else self.read([position])[0] for position in positions]
        try:
            return list(self._reader.read(positions))
        except Exception as error:
            if len(positions) == 1:
                return [error]
            return [self.read([position])[0] for position in positions]


class SplitReader:
    """The rows of a split, each file opened alone, so that a damaged file hides nothing of the others."""

    def __init__(self, split: Any, *, resolution: int) -> None:
        """Opens the files of `split`, a TFDS `SplitInfo`, whose images should be `resolution` pixels wide and high."""
        self.files = [
            RecordFile(pathlib.Path(path), described=length)
            for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        self._ends = np.cumsum(split.shard_lengths)  # row after the last one of every file
        self._starts = self._ends - split.shard_lengths
        self._resolution = resolution

    def __len__(self) -> int:
        """The number of rows that the dataset's description says."""
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, rows: Sequence[int]) -> Iterator[Row]:
        """The given rows, in ascending order, decoded one at a time."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers):
            positions = np.asarray(rows)[numbers == number] - self._starts[number]
            for example in self.files[number].read(positions.tolist()):
                yield self._decode(example)

    def _decode(self, example: bytes | Exception | None) -> Row:
        if example is None:
            return Row()
        if isinstance(example, Exception):
            return Row(failure=records.reason(example))
        name = ""
        try:
            name = os.fsdecode(records.feature_bytes(example, "name"))
            with Image.open(io.BytesIO(records.feature_bytes(example, "image")), formats=["PNG"]) as image:
                pixels = np.asarray(image)
        except UnidentifiedImageError:  # whose text has an address in it
            return Row(name, failure="cannot identify a PNG image")
        except Exception as error:  # Pillow and protobuf raise many kinds for damaged bytes
            return Row(name, failure=records.reason(error))
        shape = (self._resolution, self._resolution, CHANNELS)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            return Row(name, failure=f"is {pixels.dtype}{list(pixels.shape)}, not uint8{list(shape)}")
        return Row(name, pixels)


class StoreReader:
    """The pixel store of a split, which is compared with the images as these are decoded."""

    def __init__(self, directory: pathlib.Path, split: str, shape: tuple[int, ...]) -> None:
        """Opens the store of a split of `directory`, which should be uint8 of `shape`."""
        self.pixels: UInt8[np.ndarray, "n r r 3"] | None = None  # None where it is missing or cannot be read
        path = directory / "pixels" / f"{split}.npy"
        self.name = f"pixels/{path.name}"
        self.exists = path.exists() and path.with_suffix(".json").exists()
        self.interrupted = not self.exists and (path.exists() or path.with_suffix(".json").exists())
        self._wrong = ""
        self._differing: list[int] = []
        self._digest = hashlib.sha256()
        self._sha256 = ""
        if not self.exists:
            return
        try:
            record = json.loads(path.with_suffix(".json").read_bytes())
            self._sha256, recorded = record["sha256"], tuple(record["shape"])
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises many kinds for a damaged header
            self._wrong = f"cannot be read ({records.reason(error)})"
            return
        if not pixels.shape == recorded == shape or pixels.dtype != np.uint8:
            self._wrong = f"is {pixels.dtype}{list(pixels.shape)}, recorded as {list(recorded)}, not {list(shape)}"
            return
        self.pixels = pixels

    def update(self, rows: range, differing: list[int]) -> None:
        """Takes the next rows, and those of them that are not the images'."""
        if self.pixels is not None:
            self._digest.update(np.ascontiguousarray(self.pixels[rows.start : rows.stop]).data)
            self._differing += differing

    def finish(self) -> str:
        """What is wrong; empty where all rows were taken and the store is whole."""
        wrong = [self._wrong] if self._wrong else []
        if self.pixels is not None and self._digest.hexdigest() != self._sha256:
            wrong.append("has other bytes than were written")
        if self.pixels is not None and self._differing:
            rows = ", ".join(map(str, self._differing[:ROWS_TOLD])) + ", ..." * (len(self._differing) > ROWS_TOLD)
            wrong.append(f"{len(self._differing)} of {len(self.pixels)} rows differ from the dataset's images ({rows})")
        return "; ".join(wrong)
