"""Images to ArrayRecord files, shard by shard, so that an interrupted run resumes where it stopped.

Beside a shard is its manifest, a record of what went into it. The next run keeps a shard if its manifest names the very
same files, sizes and times, and its file has the bytes that were written; it converts the others.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import PIL

import facevae_jax
from facevae_jax.core.files import AnyPath, file_sha256, write_json
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.layouts.types import Layout, SourceImage
from facevae_jax.data.prepared.locations import uploading
from facevae_jax.data.prepared.reading import import_tfds
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


class Job(NamedTuple):
    """What everyone who converts a shard must know; it can be sent to other machines."""

    name: str  # of the dataset
    task: images.Task
    attributes: list[str]
    folder: AnyPath  # of the shards
    manifests: AnyPath  # the folder of the manifests
    threads: int

    def manifest(self, shard: Shard) -> AnyPath:
        """Where the manifest of a shard is."""
        return self.manifests / f"{shard.file_name(self.name)}.json"


@dataclasses.dataclass
class Outcome:
    """The result of a run."""

    shards: list[tuple[Shard, Manifest]]  # in the order of the layout
    reused: int = 0  # images that an earlier run converted

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


def convert_layout(layout: Layout, job: Job) -> Outcome:
    """Writes all shards and their manifests."""
    import_for_writing()
    outcome, written = Outcome([]), 0
    shards = [(shard, *earlier(shard, job)) for shard in plan_shards(layout, resolution=job.task.resolution)]
    waiting = (image.file for shard, _, kept in shards if kept is None for image in shard.members)
    with (
        progress_bar(total=sum(map(len, layout.splits.values()))) as progress,
        images.converting(waiting, job.task, threads=job.threads) as stream,  # continues while a shard is hashed
    ):
        for shard, mark, kept in shards:
            if kept is not None:
                progress.update(len(shard.members))
                outcome.reused += kept.images
            made = kept or write_shard(shard, job, mark, stream, advance=progress.update)
            outcome.shards.append((shard, made))
            written += made.size
            progress.set_postfix_str(f"{written / 1e6:,.0f} MB, {len(outcome.bad)} bad", refresh=False)
    return outcome


def earlier(shard: Shard, job: Job) -> tuple[str, Manifest | None]:
    """The shard's fingerprint, and its manifest if an earlier run has written it."""
    mark = fingerprint(shard, job.task, job.attributes)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        found = read_manifest(job.manifest(shard))
        if found.fingerprint == mark and found.sha256 == file_sha256(job.folder / shard.file_name(job.name)):
            return mark, found
    return mark, None


def write_shard(
    shard: Shard, job: Job, mark: str, stream: Iterator[images.Converted], *, advance: Callable[[int], Any]
) -> Manifest:
    """Writes the shard's file from the next of the converted images, and then its manifest.

    `advance` is called with numbers of images that are done.
    """
    bad, enlarged = [], 0
    with uploading(job.folder / shard.file_name(job.name)) as local:
        with writer(local) as write:
            for image in shard.members:
                result = next(stream)
                advance(1)
                if result.failure:
                    bad.append(BadImage(image.name, result.failure))
                    continue
                values = dict(zip(job.attributes, image.attributes, strict=True))
                write(encode_example(result.png, name=os.fsencode(image.name), attributes=values))
                enlarged += result.enlarged
        count = len(shard.members) - len(bad)
        made = Manifest(mark, file_sha256(local), local.stat().st_size, count, enlarged, tuple(bad))
    with uploading(job.manifest(shard)) as local:
        write_json(local, made._asdict())
    return made


def fingerprint(shard: Shard, task: images.Task, attributes: list[str]) -> str:
    """Of all that decides the bytes of the shard's file: versions, the task, each file's name, size and time."""
    versions = (facevae_jax.__version__, PIL.__version__, zlib.ZLIB_RUNTIME_VERSION)
    digest = hashlib.sha256(repr((versions, images.PNG_STRATEGY, task, attributes)).encode())
    for image in shard.members:
        digest.update(repr((image.name, image.attributes, images.stamp(image.file))).encode())
    return digest.hexdigest()


def read_manifest(path: AnyPath) -> Manifest:
    """The manifest in a file; raises an OSError, ValueError, TypeError or KeyError if it is missing or incomplete."""
    content = json.loads(path.read_bytes())
    return Manifest(**content | {"bad": tuple(BadImage(*entry) for entry in content["bad"])})


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
