"""Checks a prepared dataset: its files, every image, its pixel stores, and which images it holds twice."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError, make_writable_directory, some
from facevae_jax.core.files import atomic_writer, file_sha256, reason, write_json
from facevae_jax.core.parallel import map_in_order
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data import store
from facevae_jax.data.layouts.types import SPLITS
from facevae_jax.data.prepared import reading
from facevae_jax.data.sources import images

REPORT, DUPLICATES = "report.json", "duplicates.jsonl"
SHEET_IMAGES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 128  # the side in pixels, of each image


class Row(NamedTuple):
    """One record, as far as it can be read."""

    name: str = ""  # path of the source file
    pixels: UInt8[np.ndarray, "r r 3"] | None = None
    failure: str = ""  # why there are no pixels; empty too if the whole file, or its end, is missing


class SplitReader:
    """The rows of a split that may be damaged; each file is opened alone, so that one hides nothing of the others."""

    def __init__(self, split: Any, *, resolution: int) -> None:
        """Opens the files of `split`, a TFDS `SplitInfo`, whose images should be `resolution` pixels wide and high."""
        self.failures: dict[str, str] = {}  # by file name, why it cannot be read
        self._files: list[Any] = []
        self._starts = np.cumsum([0, *split.shard_lengths])  # first row of each file
        self._shape = (resolution, resolution, CHANNELS)
        for path, described in zip(map(pathlib.Path, split.filepaths), split.shard_lengths, strict=True):
            try:
                self._files.append(reading.open_files([path]))
                if (held := len(self._files[-1])) != described:
                    self.failures[path.name] = f"holds {held} records where {reading.INFO_FILE} says {described}"
            except Exception as error:  # array_record raises RuntimeError, ValueError and others
                self._files.append([])
                missing = not path.exists()
                self.failures[path.name] = "is missing" if missing else f"cannot be read ({reason(error)})"

    def __len__(self) -> int:
        """The number of rows that the dataset's description says."""
        return int(self._starts[-1])

    def read(self, row: int) -> Row:
        """One row, decoded."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, position = self._files[number], row - int(self._starts[number])
        if position >= len(file):
            return Row()
        name = ""
        try:
            example = file[position]
            name = os.fsdecode(reading.feature_bytes(example, "name"))
            pixels = reading.decode_image(example)
        except Exception as error:  # array_record, Pillow and protobuf raise many kinds for damaged bytes
            return Row(name, failure=images.why_unreadable(error))
        if pixels.shape != self._shape:
            return Row(name, failure=f"is uint8{list(pixels.shape)}, not uint8{list(self._shape)}")
        return Row(name, pixels)


@dataclasses.dataclass
class Report:
    """What was found; an empty text means that a file is whole."""

    dataset: str  # name/resolution/version
    images: dict[str, int] = dataclasses.field(default_factory=dict)  # that can be decoded, by split
    described: dict[str, int] = dataclasses.field(default_factory=dict)  # by split, in the dataset's description
    checksums: bool = False  # whether the dataset has any
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # what is wrong, by file
    damaged: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # split, row, name, reason of images
    stores: dict[str, str] = dataclasses.field(default_factory=dict)  # what is wrong, by file
    duplicates: dict[str, int] = dataclasses.field(default_factory=dict)  # pairs, by split or `split/split`
    notes: list[str] = dataclasses.field(default_factory=list)
    sheets: list[str] = dataclasses.field(default_factory=list)  # contact sheets

    @property
    def leakage(self) -> dict[str, int]:
        """Images of the later of two splits that have a copy in the earlier, by `earlier/later`."""
        return {pair: count for pair, count in self.duplicates.items() if "/" in pair}

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, each on one line."""
        texts = [f"{name}: {wrong}" for name, wrong in self.files.items() if wrong]
        for image in self.damaged:
            name = f" ({ascii(image['name'])[1:-1]})" if image["name"] else ""
            texts.append(f"{image['split']} row {image['row']}{name}: {image['reason']}")
        return texts + [f"{name}: {wrong}" for name, wrong in self.stores.items() if wrong]

    @property
    def summary(self) -> list[str]:
        """A few lines on what was checked."""
        counts = (f"{self.images[split]} of {self.described[split]} {split}" for split in self.images)
        whole = list(self.files.values()).count("")
        stores = (f"{name} {'is not' if text else 'is'} whole" for name, text in self.stores.items())
        leaks = (
            f"{count} of {self.images[later]} {later} images are in {earlier} too"
            for (earlier, later), count in ((pair.split("/"), count) for pair, count in self.leakage.items())
        )
        return [
            f"images: {', '.join(counts)} can be decoded",
            f"record files: {whole} of {len(self.files)} are whole"
            + ("" if self.checksums else "; there are no checksums"),
            f"pixel stores: {', '.join(stores) or 'none'}",
            f"duplicates: {', '.join(f'{count} {pair}' for pair, count in self.duplicates.items()) or 'none found'}",
            f"leakage: {', '.join(leaks) or 'none found'}",
            *(f"note: {note}" for note in self.notes),
        ]


def verify_dataset(directory: pathlib.Path, *, output: str | os.PathLike[str], threads: int) -> Report:
    """Checks a prepared dataset, and writes the report, the list of duplicates and a contact sheet for every split.

    Every image is decoded once, and memory grows by some 100 bytes an image. Duplicates do not count as problems.

    Raises UserError: the dataset's description cannot be read, or `output` cannot be written to.
    """
    folder = make_writable_directory(output, name="--output")
    info = reading.open_info(directory).info
    report = Report(dataset="/".join(directory.parts[-3:]))
    resolution = int(directory.parent.name)
    _check_files(directory, report, threads=threads)
    # Of two splits that share an image, the later one is spoilt.
    names = sorted(info.splits, key=lambda name: (*(name != known for known in SPLITS), name))
    readers = {split: SplitReader(info.splits[split], resolution=resolution) for split in names}
    for reader in readers.values():
        report.files |= {name: failure for name, failure in reader.failures.items() if not report.files.get(name)}
    try:
        with atomic_writer(folder / DUPLICATES) as listed:
            digests = {
                split: _check_split(directory, split, reader, report, folder, threads=threads)
                for split, reader in readers.items()
            }
            for pair in _duplicates(digests, readers):
                between = "/".join(dict.fromkeys(end["split"] for end in pair.values()))
                report.duplicates[between] = report.duplicates.get(between, 0) + 1
                listed.write(json.dumps(pair).encode() + b"\n")
        derived = {"leakage": report.leakage, "problems": report.problems}
        write_json(folder / REPORT, dataclasses.asdict(report) | derived)
    except OSError as error:
        raise UserError(f"--output={str(output)!r} cannot be written ({reason(error)}): choose another.") from error
    return report


def _check_files(directory: pathlib.Path, report: Report, *, threads: int) -> None:
    """Compares the record files with the checksums from when they were written."""
    try:
        reading.read_metadata(directory)
    except UserError:
        report.files["metadata.json"] = "cannot be read"
    found = {path.name: path for path in sorted(directory.glob("*.array_record-*"))}
    report.files.update(dict.fromkeys(found, ""))
    path = directory / reading.CHECKSUMS
    if not path.exists():
        report.notes.append(f"there is no {path.name}: the dataset was made by an older version of this project.")
        return
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        report.files[path.name] = "cannot be read"
        return
    report.checksums = True

    def compare(name: str) -> tuple[str, str]:
        if name not in found:
            return name, "is missing"
        if name not in expected:
            return name, f"is not among those of {path.name}"
        size, sha256 = expected[name]
        try:
            held = found[name].stat().st_size
            if held != size:
                return name, f"has {held} bytes where {size} were written"
            return name, "" if file_sha256(found[name]) == sha256 else "has other bytes than were written"
        except OSError as error:
            return name, reason(error)

    report.files |= map_in_order(compare, sorted(found.keys() | expected.keys()), threads=threads)


def _check_split(
    directory: pathlib.Path, split: str, reader: SplitReader, report: Report, output: pathlib.Path, *, threads: int
) -> UInt64[np.ndarray, " n"]:
    """Decodes every image of a split, compares it with the pixel store, and writes the contact sheet.

    Returns a hash of the pixels of each image; 0 where they cannot be decoded.
    """
    count, resolution = len(reader), int(directory.parent.name)
    path, shape = directory / "pixels" / f"{split}.npy", (count, resolution, resolution, CHANNELS)
    has_store = path.exists() and path.with_suffix(".json").exists()
    wrong = store.damage(path, shape) if has_store else ""
    pixels = np.load(path, mmap_mode="r") if has_store and wrong in ("", store.OTHER_BYTES) else None
    digests, differs, damaged = np.zeros(count, np.uint64), np.zeros(count, bool), dict[int, Row]()
    side, shown = min(resolution, SHEET_SIDE), np.linspace(0, count - 1, min(SHEET_IMAGES, count)).astype(int).tolist()
    tiles = {row: np.full((side, side, CHANNELS), 255, np.uint8) for row in shown}  # white where damaged

    def check(rows: range) -> int:
        for row in rows:
            read = reader.read(row)
            if read.failure:
                damaged[row] = read
            if read.pixels is None:
                continue
            digests[row] = int.from_bytes(hashlib.blake2b(read.pixels.tobytes(), digest_size=8).digest(), "little")
            differs[row] = pixels is not None and not np.array_equal(pixels[row], read.pixels)
            if row in tiles:
                tile = Image.fromarray(read.pixels).resize((side, side), Image.Resampling.LANCZOS)
                tiles[row] = np.asarray(tile)
        return len(rows)

    size = max(1, min(images.CHUNK_IMAGES, images.CHUNK_BYTES // (CHANNELS * resolution**2)))
    chunks = (range(start, min(start + size, count)) for start in range(0, count, size))
    with progress_bar(total=count, description=f"checking {split}") as progress:
        for checked in map_in_order(check, chunks, threads=threads):
            progress.update(checked)
    for row, read in sorted(damaged.items()):
        report.damaged.append({"split": split, "row": row, "name": read.name, "reason": read.failure})
    report.described[split] = count
    report.images[split] = int(np.count_nonzero(digests))
    if has_store:
        rows = np.flatnonzero(differs).tolist()
        text = f"{len(rows)} of {count} rows differ from the dataset's images ({some(map(str, rows))})" if rows else ""
        report.stores[f"pixels/{path.name}"] = "; ".join(filter(None, (wrong, text)))
    elif path.exists():
        report.notes.append(f"pixels/{path.name} was not completed: the next run makes it again.")
    if tiles:
        sheet = output / f"contact_{split}.png"
        pictures.write_png(sheet, pictures.grid(np.stack(list(tiles.values())), columns=SHEET_COLUMNS))
        report.sheets.append(str(sheet))
    return digests


def _duplicates(
    digests: Mapping[str, UInt64[np.ndarray, " n"]], readers: Mapping[str, SplitReader]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Pairs of images with the same pixels: each such image with the first in each split up to its own.

    So the pairs are fewer than images times splits, however many copies there are. The 64 bits of the hashes agree by
    chance in one of 37 million datasets of a million images.
    """
    first: dict[str, dict[int, int]] = {}  # row of the first image with a hash, by split
    for split, found in digests.items():
        first[split] = {}
        for row, digest in enumerate(found.tolist()):
            for other, rows in first.items() if digest else ():
                if digest in rows:
                    ends = {"first": (other, rows[digest]), "second": (split, row)}
                    yield {
                        end: {"split": name, "row": at, "name": readers[name].read(at).name}
                        for end, (name, at) in ends.items()
                    }
            first[split].setdefault(digest, row)
