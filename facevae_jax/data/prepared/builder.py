"""Making a prepared dataset: TFDS's metadata around the converted shards, published when everything is complete.

On this machine the dataset is made in the folder `incomplete` beside its place, and gets its name in one step at the
end. An object store has no folders to rename: there record files get their names at once, `dataset_info.json`, without
which a folder is not a dataset, is written last, and from then on nothing changes.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

import facevae_jax
from facevae_jax.core.errors import UserError, some
from facevae_jax.core.files import AnyPath, LockedError, locked, reason, write_json
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.layouts.types import TRAIN, Layout
from facevae_jax.data.prepared import reading
from facevae_jax.data.prepared.conversion import Job, Manifest, Outcome, convert_layout
from facevae_jax.data.prepared.locations import is_remote, make_writable, uploading
from facevae_jax.data.sources import images

BAD_IMAGES = "bad_images.jsonl"
INCOMPLETE = "incomplete"  # beside the dataset, while it is made and after an interrupted run

Policy = Literal["error", "skip"]


class Prepared(NamedTuple):
    """What was prepared."""

    directory: AnyPath
    images: dict[str, int]  # by split
    bad: int  # images that were left out
    enlarged: int  # images that were smaller than the resolution
    reused: int  # images that an earlier run converted
    images_per_second: float


def prepare_dataset(
    layout: Layout,
    *,
    data_dir: str | os.PathLike[str],
    name: str,
    resolution: int,
    workers: int,
    on_bad_image: Policy = "error",
    convert: Callable[[Layout, Job], Outcome] = convert_layout,
) -> Prepared:
    """Converts every image of `layout` and writes the dataset; an existing one is replaced at the end.

    An interrupted run, however it ended, leaves its work beside the dataset, and the next run resumes from there. The
    bytes written depend neither on that nor on the number of workers. Nothing is published before all images are
    converted.

    In an object store under `data_dir` an existing dataset is never replaced. If an image cannot be used, the policy
    `error` publishes nothing, and `skip` lists it in bad_images.jsonl.

    Raises UserError: images cannot be used, `data_dir` cannot be written to, or another process prepares this dataset.
    """
    target = reading.dataset_directory(data_dir, name=name, resolution=resolution)
    incomplete, remote = target.parent / INCOMPLETE, is_remote(target)
    make_writable(incomplete, data_dir, name="--data_dir")
    if remote and reading.is_published(target):
        raise UserError(f"{target} is prepared already, and others may read it: delete it first, or use --name=NAME.")
    made = target if remote else incomplete / target.name
    task = images.Task(layout.crop, resolution, layout.resize)
    attributes = [attribute.name for attribute in layout.attributes]
    job = Job(name, task, attributes, folder=made, manifests=incomplete / "manifests", threads=workers)
    # Each object store's library raises its own kinds; RuntimeError is array_record's.
    failures: tuple[type[Exception], ...] = (Exception,) if remote else (OSError, RuntimeError)
    try:
        with contextlib.nullcontext() if remote else locked(incomplete / "lock", wait=False):
            if not remote:
                _repair(incomplete, target)
            started = time.monotonic()
            outcome = convert(layout, job)
            seconds = time.monotonic() - started
            if not outcome.counts.get(TRAIN) or (outcome.bad and on_bad_image == "error"):
                raise _bad_images(outcome, layout, incomplete / BAD_IMAGES)
            _finish(outcome, layout, job)
            if not remote:
                _publish(made, target, old=incomplete / "old")
            incomplete.rmtree() if remote else shutil.rmtree(incomplete)  # type: ignore[union-attr]
    except UserError:
        raise
    except LockedError as error:
        raise UserError(f"{incomplete}: another process is preparing this dataset: wait until it ends.") from error
    except failures as error:
        raise UserError(
            f"--data_dir={str(data_dir)!r}: {target} cannot be written ({reason(error)}): fix that and run the same "
            f"command again, which resumes from what is done; or delete {incomplete}."
        ) from error
    counts = {split: count for split, count in outcome.counts.items() if count}
    enlarged = sum(manifest.enlarged for _, manifest in outcome.shards)
    speed = (sum(counts.values()) - outcome.reused) / max(seconds, 1e-9)
    return Prepared(target, counts, len(outcome.bad), enlarged, outcome.reused, speed)


def _repair(incomplete: AnyPath, target: AnyPath) -> None:
    """Makes the folder `incomplete` ready, whatever a killed run has left there."""
    old = incomplete / "old"
    if old.exists():  # a run was killed while the new dataset took the place of the old one
        shutil.rmtree(old) if target.exists() else old.rename(target)
    for folder in (incomplete / target.name, incomplete / "manifests"):
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink()


def _bad_images(outcome: Outcome, layout: Layout, listed: AnyPath) -> UserError:
    """The error that names the bad images, all of which it lists in the file `listed`."""
    with uploading(listed) as file:
        file.write_text(outcome.list_of_bad)
    total = sum(map(len, layout.splits.values()))
    first = some(f"{ascii(image.path)[1:-1]}: {image.reason}" for image in outcome.bad)
    skip = ", or leave them out with --on_bad_image=skip" if outcome.counts.get(TRAIN) else ""
    return UserError(
        f"{len(outcome.bad)} of {total} images cannot be used ({first}), all are listed in {listed}: replace or "
        f"remove them{skip}, and run the same command again; nothing was published, and what is done is kept."
    )


def _finish(outcome: Outcome, layout: Layout, job: Job) -> None:
    """Leaves in the folder the shards of splits with images and the metadata, dataset_info.json last."""
    counts = outcome.counts
    shards = {shard.file_name(job.name): (shard.split, found) for shard, found in outcome.shards if counts[shard.split]}
    for path in list(job.folder.iterdir()):
        if path.name not in shards:
            path.unlink()
    with tempfile.TemporaryDirectory(prefix="facevae-") as metadata:
        made = pathlib.Path(metadata)
        if outcome.bad:
            (made / BAD_IMAGES).write_text(outcome.list_of_bad)
        _write_info(made, shards, layout, job)
        checksums = {file: {"bytes": found.size, "sha256": found.sha256} for file, (_, found) in sorted(shards.items())}
        write_json(made / reading.CHECKSUMS, checksums)
        for file in sorted(made.iterdir(), key=lambda file: (file.name == reading.INFO_FILE, file.name)):
            (job.folder / file.name).write_bytes(file.read_bytes())


def _write_info(folder: AnyPath, shards: dict[str, tuple[str, Manifest]], layout: Layout, job: Job) -> None:
    """Writes TFDS's description of shards, which are given by file name with their split and manifest."""
    tfds, resolution = reading.import_tfds(), job.task.resolution
    splits: dict[str, list[Manifest]] = {}
    for split, manifest in shards.values():
        splits.setdefault(split, []).append(manifest)
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(resolution, resolution, CHANNELS), encoding_format="png"),
        "name": tfds.features.Text(doc="path of the source file"),
    }
    if layout.attributes:
        features["attributes"] = {attribute.name: np.float32 for attribute in layout.attributes}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=job.name,
            version=tfds.core.Version(reading.VERSION),
            data_dir=os.fspath(folder),
            module_name=__name__,
            config_name=str(resolution),
            config_description=layout.crop.description,
        ),
        description=f"{printable(layout.source)}: {layout.crop.description}, {resolution}x{resolution} pixels.",
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(_provenance(layout, resolution)),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=job.name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[manifest.images for manifest in manifests],
                num_bytes=sum(manifest.size for manifest in manifests),
                filename_template=template.replace(split=split),
            )
            for split, manifests in splits.items()
        )
    )
    info.write_to_directory(folder)


def _provenance(layout: Layout, resolution: int) -> dict[str, Any]:
    """Where the pixels come from, without absolute paths: datasets are shared."""
    return {
        "layout": layout.kind,
        "source": printable(layout.source),
        "files": hash_of_names(layout),
        "resolution": resolution,
        "crop": layout.crop.description,
        "resize": images.RESIZES[layout.resize],
        "colour": "8-bit RGB, transparency over white, EXIF orientation applied, ICC profiles converted to sRGB",
        "attributes": [
            {key: value for key, value in attribute._asdict().items() if value} for attribute in layout.attributes
        ],
        "versions": {
            "facevae_jax": facevae_jax.__version__,
            "pillow": importlib.metadata.version("pillow"),
            "tensorflow_datasets": importlib.metadata.version("tensorflow-datasets"),
        },
    }


def hash_of_names(layout: Layout) -> str:
    """Of the names of all images with their splits: it changes where images are added, removed or renamed."""
    digest = hashlib.sha256()
    for split, found in layout.splits.items():
        for image in found:
            digest.update(os.fsencode(f"{split}/{image.name}\0"))
    return digest.hexdigest()[:16]


def printable(name: str) -> str:
    """The name of a file as text: bytes that are no UTF-8 become question marks."""
    return name.encode(errors="replace").decode()


def _publish(made: AnyPath, target: AnyPath, *, old: AnyPath) -> None:
    """Flushes every file to the disk, then gives `made` the name `target`, and an existing dataset the name `old`."""
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        target.rename(old)
    made.rename(target)
