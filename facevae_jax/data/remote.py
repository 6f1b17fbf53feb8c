"""A prepared dataset on an object store, which has no folders that could be renamed.

Shards get their names at once, each when it is whole. `dataset_info.json`, without which a folder is no dataset, is
written last; from then on nothing in the folder changes. What belongs to the pass alone (lists and notes of shards,
the bad images) is in the folder `incomplete` beside it, which is deleted at the end.
"""

import os
import pathlib
import tempfile

from facevae_jax.data import dataset, images
from facevae_jax.data.builder import (
    BAD_IMAGES,
    INCOMPLETE,
    Converter,
    Policy,
    Prepared,
    bad_images,
    is_refused,
    list_bad,
    published_shards,
    summarize,
    write_metadata,
)
from facevae_jax.data.conversion import Outcome
from facevae_jax.data.layouts import Layout
from facevae_jax.data.locations import written_aside
from facevae_jax.data.records import INFO_FILE, reason
from facevae_jax.errors import UserError


def prepare_dataset(
    layout: Layout,
    *,
    data_dir: str | os.PathLike[str],
    name: str,
    resolution: int,
    workers: int,
    on_bad_image: Policy = "error",
    convert: Converter,
) -> Prepared:
    """Converts every image of `layout` and writes the dataset to a URL; arguments as of `builder.prepare_dataset`.

    Raises:
      UserError: images cannot be used, `data_dir` cannot be written to, or the dataset is there already.
    """
    target = dataset.dataset_directory(data_dir, name=name, resolution=resolution)
    incomplete = target.parent / INCOMPLETE
    _prove_writable(incomplete, data_dir)
    if dataset.is_published(target):
        raise UserError(
            f"{target} is prepared already, and what others may be reading is not overwritten there: delete it first, "
            "or prepare another with --name=NAME."
        )
    task = images.Task(layout.crop, resolution)
    try:
        outcome = convert(layout, task, folder=target, notes=incomplete / "notes", name=name, workers=workers)
        if is_refused(outcome, on_bad_image):
            with written_aside(incomplete / BAD_IMAGES) as file:
                list_bad(file, outcome.bad)
            raise bad_images(outcome, layout, incomplete / BAD_IMAGES)
        _publish(target, outcome, layout, task, name=name)
        incomplete.rmtree()  # type: ignore[attr-defined]  # an epath.Path
    except UserError:
        raise
    except Exception as error:  # each store's library raises its own kinds
        raise UserError(
            f"--data_dir={str(data_dir)!r}: {target} cannot be written ({reason(error)}): put that right and run the "
            "same command again, which goes on from what is done."
        ) from error
    return summarize(target, outcome)


def _prove_writable(folder: pathlib.Path, data_dir: str | os.PathLike[str]) -> None:
    """Raises a UserError where files cannot be written: before hours of work, not after."""
    probe = folder / f"writable-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # each store's library raises its own kinds; ImportError where there is none
        raise UserError(
            f"--data_dir={str(data_dir)!r} cannot be written to ({reason(error)}): check its name and your rights, and "
            "that its library is installed (gcsfs for gs://, s3fs for s3://, adlfs for az://)."
        ) from error


def _publish(target: pathlib.Path, outcome: Outcome, layout: Layout, task: images.Task, *, name: str) -> None:
    """Removes what a pass over something else has left, and writes the metadata, dataset_info.json last."""
    kept = published_shards(outcome, name=name)
    for path in list(target.iterdir()):
        if path.name not in kept:
            path.unlink()
    with tempfile.TemporaryDirectory(prefix="facevae-") as folder:
        made = pathlib.Path(folder)
        write_metadata(made, outcome, layout, task, name=name)
        for file in sorted(made.iterdir(), key=lambda file: (file.name == INFO_FILE, file.name)):
            (target / file.name).write_bytes(file.read_bytes())
