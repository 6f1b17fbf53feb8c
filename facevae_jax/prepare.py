"""From images to a prepared dataset, and whether one is whole.

    python -m facevae_jax.prepare --layout=celeba --source=DIR --resolution=64
    python -m facevae_jax.prepare verify --name=celeba --resolution=64

Layouts: `ffhq` (images1024x1024/ or thumbnails128x128/), `celeba` (img_align_celeba/ and its two lists), `folder` (any
PNG, JPEG and WebP files), each in a folder or in a .zip or .tar file that is not unpacked; `tfds` (a dataset such as
lfw that TFDS has prepared under --data_dir).
"""

import functools
import os
import pathlib
import re
import shlex
import sys
from typing import Any, get_args

from absl import flags

from facevae_jax import command_line, verify
from facevae_jax.config import MAX_RESOLUTION, MIN_RESOLUTION, DataConfig, TrainConfig
from facevae_jax.data import builder, celeba_layout, dataset, ffhq_layout, layouts, parallel, tfds_layout
from facevae_jax.data.attributes import SUFFIXES, join_table
from facevae_jax.data.locations import is_remote
from facevae_jax.errors import UserError, expand_home

DEFAULT_DATA_DIR = DataConfig.data_dir
RESERVED_NAME = DataConfig.name  # of the drawn faces
GENERAL_CONFIG = "configs/ffhq128.py"


def define_flags() -> None:
    """Defines the flags; not at import, so that a test or a benchmark may import this module."""
    flags.DEFINE_string("layout", None, f"what the source looks like: {', '.join(layouts.LAYOUTS)}")
    flags.DEFINE_string(
        "source", None, "the folder, .zip or .tar file of the images; for --layout=tfds the name of the dataset"
    )
    flags.DEFINE_integer("resolution", None, "pixels along one side: a power of two from 32 to 1024")
    flags.DEFINE_string("data_dir", DEFAULT_DATA_DIR, "where prepared datasets are")
    flags.DEFINE_string("name", None, "name of the dataset; by default that of the layout, or of the TFDS dataset")
    flags.DEFINE_integer("workers", None, "threads that convert images; by default one more than there are CPU cores")
    flags.DEFINE_enum(
        "on_bad_image", "error", get_args(builder.Policy), "skip: leave images out that cannot be used, and list them"
    )
    flags.DEFINE_bool("overwrite", False, "prepare anew what is prepared already")
    flags.DEFINE_string(
        "attributes", None, "labels of your own, a CSV or JSON file; or for --layout=ffhq the ffhq-features-dataset"
    )
    flags.DEFINE_string(
        "beam_options", None, "convert by Apache Beam with these options; empty: its defaults. See docs/beam.md"
    )
    flags.DEFINE_string("output", None, "for verify: where its report is written; by default in the dataset's folder")


def main(arguments: list[str]) -> int | None:
    """Reads the flags and prepares the dataset, or verifies it."""
    values = flags.FLAGS
    if arguments == ["verify"]:
        return _verify(values)
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --source={arguments[0]}.")
    if values.output is not None:
        raise UserError(f"--output={values.output!r} is for verify: leave it out.")
    try:
        prepare(
            layout=values.layout,
            source=values.source,
            resolution=values.resolution,
            data_dir=values.data_dir,
            name=values.name,
            workers=values.workers,
            on_bad_image=values.on_bad_image,
            overwrite=values.overwrite,
            attributes=values.attributes,
            beam_options=values.beam_options,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from what is done.", file=sys.stderr)
        return 130
    return None


def _verify(values: flags.FlagValues) -> int | None:
    try:
        verify.verify(name=values.name, resolution=values.resolution, data_dir=values.data_dir, output=values.output)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return None


def prepare(
    *,
    layout: str | None,
    source: str | None,
    resolution: int | None,
    data_dir: str = DEFAULT_DATA_DIR,
    name: str | None = None,
    workers: int | None = None,
    on_bad_image: builder.Policy = "error",
    overwrite: bool = False,
    attributes: str | None = None,
    beam_options: str | None = None,
) -> None:
    """Prepares a dataset and prints where it is and what to type next. The arguments are the flags.

    Raises:
      UserError: a flag is missing or impossible, or the images are not what the layout expects.
    """
    if layout not in layouts.LAYOUTS:
        raise UserError(f"--layout={layout or ''}: choose one of {', '.join(layouts.LAYOUTS)}.")
    if not source:
        what = (
            "the name of a TFDS dataset, such as lfw"
            if layout == "tfds"
            else "the folder of the images, or a .zip or .tar file"
        )
        raise UserError(f"--source is missing: give {what}.")
    if resolution is None or resolution & (resolution - 1) or not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        given = "" if resolution is None else resolution
        raise UserError(f"--resolution={given}: choose a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}.")
    name = name or (source.partition("/")[0] if layout == "tfds" else layout)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == RESERVED_NAME:
        raise UserError(
            f"--name={name!r}: use lower-case letters, digits and _, a letter first, and not {RESERVED_NAME!r}."
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers}: choose at least 1.")
    if attributes and layout != "ffhq" and not is_table(attributes):
        raise UserError(f"--attributes={attributes!r}: give a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if is_remote(data_dir):
        refuse_remote(data_dir, layout=layout, beam_options=beam_options)

    target = dataset.dataset_directory(data_dir, name=name, resolution=resolution)
    if dataset.is_published(target) and not overwrite:
        refuse_other_source(target, layout=layout, source=source)
        counts = describe_counts(dataset.split_sizes(target))
        anew = "delete it to prepare it anew" if is_remote(data_dir) else "--overwrite prepares it anew"
        print(f"already prepared: {target} ({counts}); {anew}.")
    else:
        labels = _path(attributes, name="--attributes") if attributes else None
        table = labels if labels and is_table(labels.name) else None
        features = None if table else labels
        found = open_layout(layout, source, resolution=resolution, data_dir=data_dir, attributes=features)
        if table:
            found = join_table(found, table)
        if layouts.TRAIN not in found.splits:
            counts = describe_counts({split: len(images) for split, images in found.splits.items()})
            raise UserError(f"--source={source!r} has no images to train on ({counts}): add some of the split train.")
        for note in found.notes:
            print(f"note: {note}")
        convert = prepare_here if beam_options is None else functools.partial(prepare_by_beam, options=beam_options)
        prepared = convert(
            found, data_dir=data_dir, name=name, resolution=resolution, workers=workers, on_bad_image=on_bad_image
        )
        if prepared.taken_over:
            print(f"note: {prepared.taken_over} images were taken over from a run that was stopped.")
        if prepared.bad:
            print(f"note: {prepared.bad} images were left out: see {target / builder.BAD_IMAGES}.")
        if prepared.enlarged:
            total = sum(prepared.images.values())
            print(
                f"note: {prepared.enlarged} of {total} images are smaller than {resolution} pixels and were enlarged."
            )
        print(f"prepared: {target} ({describe_counts(prepared.images)}; {prepared.images_per_second:.0f} images/s)")
    images = dataset.split_sizes(target).get("train", 0)
    print(f"next: {next_command(data_dir, name=name, resolution=resolution, images=images)}")


def prepare_here(layout: layouts.Layout, *, workers: int | None, **options: Any) -> builder.Prepared:
    """Prepares the dataset by threads of this process."""
    # A thread that waits for the GIL leaves its core idle: hence one more.
    return builder.prepare_dataset(layout, workers=workers or parallel.available_cpus() + 1, **options)


def prepare_by_beam(layout: layouts.Layout, **options: Any) -> builder.Prepared:
    """Prepares the dataset by a pipeline, which needs the extra `beam`."""
    from facevae_jax.data import beam

    return beam.prepare_dataset(layout, **options)


def refuse_remote(data_dir: str, *, layout: str, beam_options: str | None) -> None:
    """Raises a UserError where a dataset cannot be prepared at this URL."""
    if beam_options is None:
        raise UserError(
            f"--data_dir={data_dir!r} is not a folder of this machine: choose one, or add --beam_options= (an empty "
            "one converts on this machine and writes there)."
        )
    if layout == "tfds":
        raise UserError(
            f"--data_dir={data_dir!r}: --layout=tfds reads its source there: choose a folder of all workers."
        )


def refuse_other_source(target: pathlib.Path, *, layout: str, source: str) -> None:
    """Raises a UserError where the dataset at `target` was prepared from something else."""
    metadata = dataset.read_metadata(target)
    there = (metadata.get("layout"), metadata.get("source"))
    # FFHQ and CelebA are what they are, wherever they lie; folders and TFDS datasets differ by name.
    named = {"folder": _path(source).name, "tfds": source}.get(layout, there[1])
    wanted = (layout, named)
    if there != wanted:
        raise UserError(
            f"{target} was prepared from {there[1]!r} (--layout={there[0]}), not {wanted[1]!r} (--layout={wanted[0]}): "
            "--name=NAME prepares another dataset, --overwrite replaces this one."
        )


def open_layout(
    layout: str,
    source: str,
    *,
    resolution: int,
    data_dir: str = DEFAULT_DATA_DIR,
    attributes: pathlib.Path | None = None,
) -> layouts.Layout:
    """The images of `source`.

    Raises:
      UserError: they are not what the layout expects.
    """
    match layout:
        case "ffhq":
            return ffhq_layout.ffhq(_path(source), resolution=resolution, attributes=attributes)
        case "celeba":
            return celeba_layout.celeba(_path(source))
        case "folder":
            return layouts.folder(_path(source))
    return tfds_layout.tfds_dataset(source, data_dir=data_dir)


def is_table(attributes: str) -> bool:
    """Whether the flag --attributes names a table of labels, and not the ffhq-features-dataset."""
    return attributes.lower().endswith(SUFFIXES)


def _path(given: str, *, name: str = "--source") -> pathlib.Path:
    """Without `~` and `..`, so that its last part is a name."""
    return pathlib.Path(os.path.abspath(expand_home(given, name=name)))  # noqa: PTH100 - resolve() follows links


def describe_counts(images: dict[str, int]) -> str:
    """For example `16000 train, 2000 validation`."""
    return ", ".join(f"{count} {split}" for split, count in images.items())


def next_command(data_dir: str, *, name: str, resolution: int, images: int) -> str:
    """The command that trains on the dataset of `images` training images."""
    config, overrides = f"configs/{name}{resolution}.py", []
    if not pathlib.Path(config).is_file():
        config = GENERAL_CONFIG
        overrides = [f"--config.data.name={name}", f"--config.data.resolution={resolution}"]
    if data_dir != DEFAULT_DATA_DIR:
        overrides.append(f"--config.data.data_dir={data_dir}")
    if 0 < images < TrainConfig.batch_size:
        # A power of two is divisible by the usual numbers of devices.
        overrides.append(f"--config.train.batch_size={1 << (images.bit_length() - 1)}")
    words = [f"--config={config}", *overrides, f"--workdir=/tmp/{name}{resolution}"]
    return shlex.join(["python", "-m", "facevae_jax.main", *words])


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
