"""Images to ArrayRecord files, shard by shard, so that an interrupted run resumes where it stopped.

Beside a shard is its manifest, a record of what went into it. The next run keeps a shard if its manifest names the very
same files, sizes and times, and its file has the bytes that were written; it converts the others.
"""

import collections
import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import PIL
from tqdm import tqdm

import facevae_jax
from facevae_jax.core.files import AnyPath, file_sha256, write_json
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.layouts.types import Layout, SourceImage
from facevae_jax.data.prepared import records
from facevae_jax.data.sources import images

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


class Manifest(NamedTuple):
    """What is known of a shard that was written."""

    fingerprint: str  # of what went in
    sha256: str  # of the file
    size: int  # of the file, in bytes
    images: int  # in the file
    enlarged: int
    bad: tuple[BadImage, ...]


@dataclasses.dataclass
class Outcome:
    """The result of a run."""

    shards: list[tuple[Shard, Manifest]]  # in the order of the layout
    reused: int = 0  # images that an earlier run converted
    seconds: float = 0.0

    @property
    def bad(self) -> list[BadImage]:
        """All images that were left out."""
        return [image for _, manifest in self.shards for image in manifest.bad]

    @property
    def list_of_bad(self) -> str:
        """Those images as lines of JSON."""
        return "".join(json.dumps(image._asdict()) + "\n" for image in self.bad)

    @property
    def counts(self) -> dict[str, int]:
        """Images written, by split."""
        counts = collections.Counter[str]()
        for shard, manifest in self.shards:
            counts[shard.split] += manifest.images
        return dict(counts)


def plan_shards(layout: Layout, *, resolution: int) -> Iterator[Shard]:
    """Cuts every split into shards of at most `SHARD_BYTES` of pixels."""
    size = max(1, SHARD_BYTES // (CHANNELS * resolution**2))
    for split, members in layout.splits.items():
        starts = range(0, len(members), size)
        for number, start in enumerate(starts):
            yield Shard(split, number, len(starts), members[start : start + size])


def convert_layout(
    layout: Layout, task: images.Task, *, folder: AnyPath, manifests: AnyPath, name: str, workers: int
) -> Outcome:
    """Writes the shards of the dataset `name` into `folder`, and their manifests into `manifests`."""
    records.import_for_writing()
    attributes = [attribute.name for attribute in layout.attributes]
    outcome = Outcome([])
    found: list[tuple[Shard, str, Manifest | None]] = []
    for shard in plan_shards(layout, resolution=task.resolution):
        mark, file = fingerprint(shard, task, attributes), folder / shard.file_name(name)
        found.append((shard, mark, read_finished(file, manifests / f"{file.name}.json", mark)))
    files = (image.file for shard, _, manifest in found if manifest is None for image in shard.members)
    started, written = time.monotonic(), 0
    with (
        images.converting(files, task, threads=workers) as stream,
        progress_bar(total=sum(map(len, layout.splits.values()))) as progress,
    ):
        for shard, mark, manifest in found:
            if manifest is not None:
                outcome.reused += manifest.images
                progress.update(len(shard.members))
            else:
                file = folder / shard.file_name(name)
                manifest = write_shard(file, shard, stream, mark=mark, attributes=attributes, progress=progress)
                write_json(manifests / f"{file.name}.json", manifest._asdict())
            outcome.shards.append((shard, manifest))
            written += manifest.size
            progress.set_postfix_str(f"{written / 1e6:,.0f} MB, {len(outcome.bad)} bad", refresh=False)
    outcome.seconds = time.monotonic() - started
    return outcome


def write_shard(
    file: AnyPath,
    shard: Shard,
    stream: Iterator[images.Converted],
    *,
    mark: str,
    attributes: list[str],
    progress: tqdm | None = None,
) -> Manifest:
    """Takes the images of the shard from the stream and writes them."""
    bad, written, enlarged = [], 0, 0
    with records.writer(file) as write:
        for image in shard.members:
            result = next(stream)
            if progress is not None:
                progress.update()
            if result.failure:
                bad.append(BadImage(image.name, result.failure))
                continue
            values = dict(zip(attributes, image.attributes, strict=True))
            write(records.encode_example(result.png, name=os.fsencode(image.name), attributes=values))
            written += 1
            enlarged += result.enlarged
    return Manifest(mark, file_sha256(file), file.stat().st_size, written, enlarged, tuple(bad))


def fingerprint(shard: Shard, task: images.Task, attributes: list[str]) -> str:
    """Of all that decides the bytes of the shard's file: versions, the task, each file's name, size and time."""
    versions = (facevae_jax.__version__, PIL.__version__, zlib.ZLIB_RUNTIME_VERSION)
    digest = hashlib.sha256(repr((versions, images.PNG_STRATEGY, task, attributes)).encode())
    for image in shard.members:
        digest.update(repr((image.name, image.attributes, images.stamp(image.file))).encode())
    return digest.hexdigest()


def read_finished(file: AnyPath, manifest: AnyPath, mark: str) -> Manifest | None:
    """The manifest of a shard that an earlier run has written; None if there is none, or it does not fit."""
    try:
        read = read_manifest(manifest)
        return read if read.fingerprint == mark and file_sha256(file) == read.sha256 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_manifest(path: AnyPath) -> Manifest:
    """The manifest in a file; raises an OSError, ValueError, TypeError or KeyError if it is missing or incomplete."""
    content = json.loads(path.read_bytes())
    return Manifest(**content | {"bad": tuple(BadImage(*entry) for entry in content["bad"])})
