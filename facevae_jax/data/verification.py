"""Whether a prepared dataset is whole: its files, every image, its pixel stores; and which images it holds twice."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax import pictures
from facevae_jax.config import CHANNELS
from facevae_jax.data import dataset, duplicates, images, records
from facevae_jax.data.conversion import file_sha256
from facevae_jax.data.inspection import Row, SplitReader, StoreReader
from facevae_jax.data.parallel import map_in_order
from facevae_jax.errors import UserError, make_writable_directory
from facevae_jax.files import atomic_writer, write_json
from facevae_jax.progress import progress_bar

REPORT, DUPLICATES = "report.json", "duplicates.jsonl"
SPLIT_ORDER = ("train", "validation", "test")  # of two splits that share an image, the later one is spoilt
SHEET_IMAGES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 128  # the side in pixels, of each image
PAIRS_TOGETHER = 64  # candidates that a thread reads and compares at a time


@dataclasses.dataclass
class Report:
    """What was found; empty texts stand for what is whole."""

    dataset: str  # name/resolution/version
    images: dict[str, int] = dataclasses.field(default_factory=dict)  # that can be decoded, by split
    described: dict[str, int] = dataclasses.field(default_factory=dict)  # by split, in the dataset's description
    checksums: bool = False  # whether the dataset has any
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # what is wrong, by file
    damaged: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # split, row, name, reason of images
    stores: dict[str, str] = dataclasses.field(default_factory=dict)  # what is wrong, by file
    duplicates: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # pairs by kind and splits
    leakage: dict[str, int] = dataclasses.field(default_factory=dict)  # images of a split with a copy in another
    notes: list[str] = dataclasses.field(default_factory=list)
    sheets: list[str] = dataclasses.field(default_factory=list)  # contact sheets

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
        wrong = sum(map(bool, self.files.values()))
        stores = [f"{name} {'is not' if text else 'is'} whole" for name, text in self.stores.items()]
        kinds = [
            f"{sum(pairs.values())} {kind}" + (f" ({_counted(pairs)})" if pairs else "")
            for kind, pairs in self.duplicates.items()
        ]
        leaks = [
            f"{count} of {self.images[pair.split('/')[1]]} {pair.split('/')[1]} images are in {pair.split('/')[0]} too"
            for pair, count in self.leakage.items()
        ]
        return [
            f"images: {', '.join(counts)} can be decoded",
            f"record files: {len(self.files) - wrong} of {len(self.files)} are whole"
            + ("" if self.checksums else "; there are no checksums"),
            f"pixel stores: {', '.join(stores) or 'none'}",
            f"duplicates: {', '.join(kinds)}",
            f"leakage: {', '.join(leaks) or 'none found'}",
            *(f"note: {note}" for note in self.notes),
        ]

    def add(self, file: str, wrong: str) -> None:
        """Notes what is wrong with a file, beside what was found before."""
        self.files[file] = "; ".join(filter(None, (self.files.get(file), wrong)))


def _counted(pairs: Mapping[str, int]) -> str:
    """For example `12 train, 3 train/validation`."""
    return ", ".join(f"{count} {pair}" for pair, count in pairs.items())


def verify_dataset(directory: pathlib.Path, *, output: str | os.PathLike[str], threads: int) -> Report:
    """Checks a prepared dataset, and writes the report, the list of duplicates and a contact sheet for every split.

    Every image is decoded once, and memory grows by 25 bytes an image. Images that are held twice are no problem.

    Args:
      directory: of the dataset.
      output: the folder for what is written.
      threads: that decode images.

    Raises:
      UserError: the dataset's description cannot be read, or `output` cannot be written to.
    """
    folder = make_writable_directory(output, name="--output")
    info = records.open_info(directory).info
    report = Report(dataset="/".join(directory.parts[-3:]))
    resolution = int(directory.parent.name)
    _check_files(directory, report, threads=threads)
    names = sorted(info.splits, key=lambda name: (*(name != known for known in SPLIT_ORDER), name))
    readers = {split: SplitReader(info.splits[split], resolution=resolution) for split in names}
    for file in itertools.chain.from_iterable(reader.files for reader in readers.values()):
        report.add(file.name, "" if file.failure == report.files.get(file.name) else file.failure)
    perceptual = duplicates.can_compare()
    if not perceptual:
        report.notes.append('near duplicates are not looked for: pip install "facevae-jax[verify]".')
    try:
        fingerprints = np.concatenate(
            [np.empty(0, duplicates.FINGERPRINT)]
            + [
                _check_split(directory, split, reader, report, folder, perceptual=perceptual, threads=threads)
                for split, reader in readers.items()
            ]
        )
        _check_duplicates(fingerprints, readers, report, folder / DUPLICATES, threads=threads)
        write_json(folder / REPORT, dataclasses.asdict(report) | {"problems": report.problems})
    except OSError as error:
        raise UserError(
            f"--output={str(output)!r} cannot be written ({records.reason(error)}): choose another directory."
        ) from error
    return report


def _check_files(directory: pathlib.Path, report: Report, *, threads: int) -> None:
    """Compares the record files with the checksums that were noted when they were written."""
    try:
        dataset.read_metadata(directory)
    except UserError:
        report.add("metadata.json", "cannot be read")
    found = {path.name: path for path in sorted(directory.glob("*.array_record-*"))}
    report.files.update(dict.fromkeys(found, ""))
    path = directory / dataset.CHECKSUMS
    if not path.exists():
        report.notes.append(f"there is no {path.name}: the dataset was made by an older version of this project.")
        return
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        report.add(path.name, "cannot be read")
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
            return name, records.reason(error)

    for name, wrong in map_in_order(compare, sorted(found.keys() | expected.keys()), threads=threads):
        report.add(name, wrong)


class _Block(NamedTuple):
    """What a thread finds in some rows."""

    fingerprints: np.ndarray  # of type duplicates.FINGERPRINT
    failures: list[tuple[int, Row]]
    differing: list[int]  # rows whose pixels in the store are others
    tiles: list[tuple[int, np.ndarray]]  # for the contact sheet


def _check_split(
    directory: pathlib.Path,
    split: str,
    reader: SplitReader,
    report: Report,
    output: pathlib.Path,
    *,
    perceptual: bool,
    threads: int,
) -> np.ndarray:
    """Decodes every image of a split, compares it with the pixel store, and writes the contact sheet."""
    count, resolution = len(reader), int(directory.parent.name)
    store = StoreReader(directory, split, (count, resolution, resolution, CHANNELS))
    shown = dict.fromkeys(np.linspace(0, count - 1, min(SHEET_IMAGES, count)).astype(int).tolist())

    def check(rows: range) -> _Block:
        block = _Block(np.zeros(len(rows), duplicates.FINGERPRINT), [], [], [])
        for index, (row, read) in enumerate(zip(rows, reader.read(rows), strict=True)):
            if read.pixels is None:
                if read.failure:
                    block.failures.append((row, read))
                continue
            block.fingerprints[index] = duplicates.fingerprint(read.pixels, perceptual=perceptual)
            if store.pixels is not None and not np.array_equal(store.pixels[row], read.pixels):
                block.differing.append(row)
            if row in shown:
                block.tiles.append((row, _tile(read.pixels)))
        return block

    size = max(1, min(images.CHUNK_IMAGES, images.CHUNK_BYTES // (CHANNELS * resolution**2)))
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    fingerprints = np.zeros(count, duplicates.FINGERPRINT)
    side = min(resolution, SHEET_SIDE)
    tiles = {row: np.full((side, side, CHANNELS), 255, np.uint8) for row in shown}  # white where damaged
    with (
        contextlib.closing(map_in_order(check, chunks, threads=threads)) as blocks,
        progress_bar(total=count, description=f"checking {split}") as progress,
    ):
        for rows, block in zip(chunks, blocks, strict=True):
            fingerprints[rows.start : rows.stop] = block.fingerprints
            for row, read in block.failures:
                report.damaged.append({"split": split, "row": row, "name": read.name, "reason": read.failure})
            store.update(rows, block.differing)
            tiles.update(block.tiles)
            progress.update(len(rows))
    report.described[split] = count
    report.images[split] = int(np.count_nonzero(fingerprints["kind"] != duplicates.DAMAGED))
    if store.exists:
        report.stores[store.name] = store.finish()
    elif store.interrupted:
        report.notes.append(f"{store.name} was not completed: the next run makes it anew.")
    if tiles:
        path = output / f"contact_{split}.png"
        pictures.write_png(path, pictures.grid(np.stack(list(tiles.values())), columns=SHEET_COLUMNS))
        report.sheets.append(str(path))
    return fingerprints


def _tile(pixels: UInt8[np.ndarray, "r r 3"]) -> UInt8[np.ndarray, "s s 3"]:
    if len(pixels) <= SHEET_SIDE:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS))


def _check_duplicates(
    fingerprints: np.ndarray, readers: Mapping[str, SplitReader], report: Report, path: pathlib.Path, *, threads: int
) -> None:
    """Lists images that are held twice, and counts them."""
    names, starts = list(readers), np.cumsum([0, *map(len, readers.values())])
    splits = np.repeat(np.arange(len(names), dtype=np.uint8), np.diff(starts))
    near, left_out = duplicates.near_candidates(fingerprints, splits)
    if left_out:
        report.notes.append(f"{left_out} images look like very many others, and were compared with some of these only.")

    def place(index: int) -> dict[str, Any]:
        split = int(splits[index])
        return {"split": names[split], "row": int(index - starts[split])}

    def compare(job: tuple[str, np.ndarray]) -> list[dict[str, Any]]:
        kind, pairs = job
        known: dict[int, tuple[str, np.ndarray | None]] = {}
        for index in np.unique(pairs).tolist():
            where = place(index)
            (read,) = readers[where["split"]].read([where["row"]])
            appearance = duplicates.appearance(read.pixels) if kind == "near" and read.pixels is not None else None
            known[index] = read.name, appearance
        entries: list[dict[str, Any]] = []
        for one, two in pairs.tolist():
            ends = {end: place(at) | {"name": known[at][0]} for end, at in (("first", one), ("second", two))}
            first, second = known[one][1], known[two][1]
            if kind == "exact":
                entries.append({"kind": kind} | ends)
            elif first is not None and second is not None and first @ second >= duplicates.MIN_CORRELATION:
                entries.append({"kind": kind, "correlation": round(float(first @ second), 4)} | ends)
        return entries

    jobs = _jobs({"exact": duplicates.exact_pairs(fingerprints, splits), "near": near})
    counts: dict[str, collections.Counter[str]] = {"exact": collections.Counter(), "near": collections.Counter()}
    leaked: dict[str, set[int]] = collections.defaultdict(set)
    with atomic_writer(path) as file, contextlib.closing(map_in_order(compare, jobs, threads=threads)) as found:
        for entry in itertools.chain.from_iterable(found):
            file.write(json.dumps(entry).encode() + b"\n")
            splits_of = list(dict.fromkeys(entry[end]["split"] for end in ("first", "second")))
            counts[entry["kind"]]["/".join(splits_of)] += 1
            if len(splits_of) > 1:
                leaked["/".join(splits_of)].add(entry["second"]["row"])
    report.duplicates = {kind: dict(pairs) for kind, pairs in counts.items()}
    report.leakage = {pair: len(rows) for pair, rows in leaked.items()}


def _jobs(pairs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for kind, array in pairs.items():
        for start in range(0, len(array), PAIRS_TOGETHER):
            yield kind, array[start : start + PAIRS_TOGETHER]
