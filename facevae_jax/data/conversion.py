"""Images to ArrayRecord files, shard by shard, so that a pass that is stopped is gone on with.

A shard is written beside a note of what went into it. The next pass takes over a shard whose note names the very same
files, sizes and times, and whose file has the bytes that were written; it converts the others.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import PIL
from tqdm import tqdm

import facevae_jax
from facevae_jax.config import CHANNELS
from facevae_jax.data import images, records
from facevae_jax.data.layouts import Layout, SourceImage
from facevae_jax.files import write_json
from facevae_jax.progress import progress_bar

SHARD_BYTES = 2**28  # of decoded pixels


class BadImage(NamedTuple):
    """An image that cannot be used."""

    path: str  # relative to the source
    reason: str


class Shard(NamedTuple):
    """Images that are written into one file."""

    split: str
    number: int  # from 0
    of: int  # shards of the split
    members: Sequence[SourceImage]

    def file_name(self, dataset: str) -> str:
        """What TFDS calls the file."""
        return f"{dataset}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"


class Note(NamedTuple):
    """What is known of a shard that was written."""

    fingerprint: str  # of what went in
    sha256: str  # of the file
    size: int  # of the file, in bytes
    images: int  # in the file
    enlarged: int
    bad: tuple[BadImage, ...]


@dataclasses.dataclass
class Outcome:
    """What came of a pass."""

    shards: list[tuple[Shard, Note]]  # in the order of the layout
    taken_over: int = 0  # images that a pass before this one had converted
    seconds: float = 0.0

    @property
    def bad(self) -> list[BadImage]:
        """All images that were left out."""
        return [image for _, note in self.shards for image in note.bad]

    @property
    def counts(self) -> dict[str, int]:
        """Images written, by split."""
        counts: dict[str, int] = {}
        for shard, note in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + note.images
        return counts


def plan_shards(layout: Layout, *, resolution: int) -> Iterator[Shard]:
    """Cuts every split into shards of at most `SHARD_BYTES` of pixels."""
    size = max(1, SHARD_BYTES // (CHANNELS * resolution**2))
    for split, members in layout.splits.items():
        starts = range(0, len(members), size)
        for number, start in enumerate(starts):
            yield Shard(split, number, len(starts), members[start : start + size])


def convert_layout(
    layout: Layout, task: images.Task, *, folder: pathlib.Path, notes: pathlib.Path, name: str, workers: int
) -> Outcome:
    """Writes the shards of the dataset `name` into `folder`, and a note of each into `notes`."""
    records.import_for_writing()
    attributes = [attribute.name for attribute in layout.attributes]
    outcome = Outcome([])
    found: list[tuple[Shard, str, Note | None]] = []
    for shard in plan_shards(layout, resolution=task.resolution):
        mark, file = fingerprint(shard, task, attributes), folder / shard.file_name(name)
        found.append((shard, mark, read_finished(file, notes / f"{file.name}.json", mark)))
    files = (image.file for shard, _, note in found if note is None for image in shard.members)
    started, written = time.monotonic(), 0
    with (
        images.converting(files, task, threads=workers) as stream,
        progress_bar(total=sum(map(len, layout.splits.values()))) as progress,
    ):
        for shard, mark, note in found:
            if note is not None:
                outcome.taken_over += note.images
                progress.update(len(shard.members))
            else:
                file = folder / shard.file_name(name)
                note = write_shard(file, shard, stream, mark=mark, attributes=attributes, progress=progress)
                write_json(notes / f"{file.name}.json", note._asdict())
            outcome.shards.append((shard, note))
            written += note.size
            progress.set_postfix_str(f"{written / 1e6:,.0f} MB, {len(outcome.bad)} bad", refresh=False)
    outcome.seconds = time.monotonic() - started
    return outcome


def write_shard(
    file: pathlib.Path,
    shard: Shard,
    stream: Iterator[images.Converted],
    *,
    mark: str,
    attributes: list[str],
    progress: tqdm,
) -> Note:
    """Takes the images of the shard from the stream and writes them; the note is made of what was written."""
    bad, written, enlarged = [], 0, 0
    with records.writer(file) as write:
        for image in shard.members:
            result = next(stream)
            progress.update()
            if result.failure:
                bad.append(BadImage(image.name, result.failure))
                continue
            values = dict(zip(attributes, image.attributes, strict=True))
            write(records.encode_example(result.png, name=os.fsencode(image.name), attributes=values))
            written += 1
            enlarged += result.enlarged
    return Note(mark, file_sha256(file), file.stat().st_size, written, enlarged, tuple(bad))


def fingerprint(shard: Shard, task: images.Task, attributes: list[str]) -> str:
    """Of all that decides the bytes of the shard's file: versions, what is done, each file's name, size and time."""
    versions = (facevae_jax.__version__, PIL.__version__, zlib.ZLIB_RUNTIME_VERSION)
    digest = hashlib.sha256(repr((versions, images.PNG_STRATEGY, task, attributes)).encode())
    for image in shard.members:
        digest.update(repr((image.name, image.attributes, images.stamp(image.file))).encode())
    return digest.hexdigest()


def read_finished(file: pathlib.Path, note: pathlib.Path, mark: str) -> Note | None:
    """The note of a shard that a pass before has written; None where it has not, or it was something else."""
    try:
        read = read_note(note)
        return read if read.fingerprint == mark and file_sha256(file) == read.sha256 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_note(path: pathlib.Path) -> Note:
    """The note in a file; raises an OSError, ValueError, TypeError or KeyError where there is none, or half of one."""
    content = json.loads(path.read_bytes())
    return Note(**content | {"bad": tuple(BadImage(*entry) for entry in content["bad"])})


def file_sha256(file: pathlib.Path) -> str:
    """The checksum of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
