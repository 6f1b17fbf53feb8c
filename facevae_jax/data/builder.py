"""Making a prepared dataset: TFDS's metadata around the converted shards, and its name when all is whole."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

import facevae_jax
from facevae_jax.config import CHANNELS
from facevae_jax.data import dataset, images, layouts, records
from facevae_jax.data.conversion import BadImage, Note, Outcome, convert_layout
from facevae_jax.data.layouts import Layout
from facevae_jax.errors import UserError, make_writable_directory, some
from facevae_jax.files import atomic_writer, write_json

BAD_IMAGES = "bad_images.jsonl"
INCOMPLETE = "incomplete"  # beside the dataset, while it is made and after a pass that was stopped

Policy = Literal["error", "skip"]


class Converter(Protocol):
    """Converts all images of a layout, as `convert_layout` does."""

    def __call__(  # noqa: D102
        self, layout: Layout, task: images.Task, *, folder: pathlib.Path, notes: pathlib.Path, name: str, workers: int
    ) -> Outcome: ...


class Prepared(NamedTuple):
    """What a preparation wrote."""

    directory: pathlib.Path
    images: dict[str, int]  # by split
    bad: int  # images that were left out
    enlarged: int  # images that were smaller than the resolution
    taken_over: int  # images that a pass before this one had converted
    images_per_second: float


def prepare_dataset(
    layout: Layout,
    *,
    data_dir: str | os.PathLike[str],
    name: str,
    resolution: int,
    workers: int,
    on_bad_image: Policy = "error",
    convert: Converter = convert_layout,
) -> Prepared:
    """Converts every image of `layout` and writes the dataset; one that is there already is replaced at the end.

    A pass that is stopped, however hard, leaves what it has done in a folder beside the dataset, and the next goes on
    from there. The bytes written depend neither on that nor on the number of workers. Nothing is published before the
    pass is through.

    Args:
      layout: the images.
      data_dir: where prepared datasets are.
      name: of the dataset.
      resolution: pixels along one side.
      workers: threads.
      on_bad_image: `error` publishes nothing where an image cannot be used; `skip` leaves it out and lists it in the
        dataset's bad_images.jsonl.
      convert: what converts the images.

    Raises:
      UserError: images cannot be used, `data_dir` cannot be written to, or another process prepares this dataset.
    """
    target = dataset.dataset_directory(data_dir, name=name, resolution=resolution)
    make_writable_directory(target.parent, name="--data_dir")
    incomplete = target.parent / INCOMPLETE
    task = images.Task(layout.crop, resolution)
    with _lock(incomplete):
        made, notes, old = incomplete / target.name, incomplete / "notes", incomplete / "old"
        try:
            if old.exists():  # a pass was killed around the moment at which the new dataset takes the old one's place
                shutil.rmtree(old) if target.exists() else old.rename(target)
            for folder in (made, notes):
                folder.mkdir(exist_ok=True)
            outcome = convert(layout, task, folder=made, notes=notes, name=name, workers=workers)
            if is_refused(outcome, on_bad_image):
                list_bad(incomplete / BAD_IMAGES, outcome.bad)
                raise bad_images(outcome, layout, incomplete / BAD_IMAGES)
            _finish(made, outcome, layout, task, name=name)
            _replace(target, made, old=old)
        except (OSError, RuntimeError) as error:  # RuntimeError: array_record's
            raise UserError(
                f"--data_dir={str(data_dir)!r}: {target} cannot be written ({records.reason(error)}): put that right "
                f"and run the same command again, which goes on from what is done; or delete {incomplete}."
            ) from error
        shutil.rmtree(incomplete)
    return summarize(target, outcome)


def summarize(target: pathlib.Path, outcome: Outcome) -> Prepared:
    """What the pass has written to `target`."""
    counts = {split: count for split, count in outcome.counts.items() if count}
    enlarged = sum(note.enlarged for _, note in outcome.shards)
    speed = (sum(counts.values()) - outcome.taken_over) / max(outcome.seconds, 1e-9)
    return Prepared(target, counts, len(outcome.bad), enlarged, outcome.taken_over, speed)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; the lock ends with the process, however that ends."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is preparing this dataset: wait until it is done.") from error
        yield


def is_refused(outcome: Outcome, on_bad_image: Policy) -> bool:
    """Whether too many images are bad for the dataset to be published."""
    return not outcome.counts.get(layouts.TRAIN) or (bool(outcome.bad) and on_bad_image == "error")


def list_bad(path: pathlib.Path, bad: Sequence[BadImage]) -> None:
    """Writes a line of JSON about each."""
    with atomic_writer(path) as file:
        file.writelines(json.dumps(image._asdict()).encode() + b"\n" for image in bad)


def bad_images(outcome: Outcome, layout: Layout, listed: pathlib.PurePath) -> UserError:
    """The error that names the bad images, all of which are in the file `listed`."""
    total = sum(len(members) for members in layout.splits.values())
    first = some(f"{ascii(image.path)[1:-1]}: {image.reason}" for image in outcome.bad)
    skip = ", or leave them out with --on_bad_image=skip" if outcome.counts.get(layouts.TRAIN) else ""
    return UserError(
        f"{len(outcome.bad)} of {total} images cannot be used ({first}), all are listed in {listed}: replace or "
        f"remove them{skip}, and run the same command again; nothing was published, and what is done is kept."
    )


def _finish(folder: pathlib.Path, outcome: Outcome, layout: Layout, task: images.Task, *, name: str) -> None:
    """Leaves in the folder the shards that have images, TFDS's metadata and the list of bad images; nothing else."""
    kept = published_shards(outcome, name=name)
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    write_metadata(folder, outcome, layout, task, name=name)
    _flush(folder)


def published_shards(outcome: Outcome, *, name: str) -> dict[str, tuple[str, Note]]:
    """By file name, split and note of each shard of the splits that have images."""
    counts = outcome.counts
    return {shard.file_name(name): (shard.split, note) for shard, note in outcome.shards if counts[shard.split]}


def write_metadata(folder: pathlib.Path, outcome: Outcome, layout: Layout, task: images.Task, *, name: str) -> None:
    """Writes what a dataset has besides its shards, which need not be in this folder."""
    tfds = records.import_tfds()
    shards = published_shards(outcome, name=name)
    splits: dict[str, list[Note]] = {}
    for split, note in shards.values():
        splits.setdefault(split, []).append(note)
    if outcome.bad:
        list_bad(folder / BAD_IMAGES, outcome.bad)
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(task.resolution, task.resolution, CHANNELS), encoding_format="png"),
        "name": tfds.features.Text(doc="path of the source file"),
    }
    if layout.attributes:
        features["attributes"] = {attribute.name: np.float32 for attribute in layout.attributes}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version(dataset.VERSION),
            data_dir=os.fspath(folder),
            module_name=__name__,
            config_name=str(task.resolution),
            config_description=layout.crop.description,
        ),
        description=f"{layout.source}: {layout.crop.description}, {task.resolution}x{task.resolution} pixels.",
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(_provenance(layout, task.resolution)),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[note.images for note in notes],
                num_bytes=sum(note.size for note in notes),
                filename_template=template.replace(split=split),
            )
            for split, notes in splits.items()
        )
    )
    info.write_to_directory(folder)
    checksums = {file: {"bytes": note.size, "sha256": note.sha256} for file, (_, note) in sorted(shards.items())}
    write_json(folder / dataset.CHECKSUMS, checksums)


def _provenance(layout: Layout, resolution: int) -> dict[str, Any]:
    """Where the pixels come from. No absolute path: datasets are shared."""
    return {
        "layout": layout.kind,
        "source": layout.source,
        "resolution": resolution,
        "crop": layout.crop.description,
        "resize": images.RESIZE,
        "colour": "8-bit RGB, transparency over white, EXIF orientation applied, ICC profiles ignored",
        "attributes": [
            {key: value for key, value in attribute._asdict().items() if value} for attribute in layout.attributes
        ],
        "versions": {
            "facevae_jax": facevae_jax.__version__,
            "pillow": importlib.metadata.version("pillow"),
            "tensorflow_datasets": importlib.metadata.version("tensorflow-datasets"),
        },
    }


def _flush(directory: pathlib.Path) -> None:
    """Has every file on the disk before the directory takes its name."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _replace(target: pathlib.Path, made: pathlib.Path, *, old: pathlib.Path) -> None:
    """Gives `made` the name `target`, and what had it the name `old`."""
    if target.exists():
        target.rename(old)
    made.rename(target)
