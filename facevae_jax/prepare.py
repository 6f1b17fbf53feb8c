"""From images to a prepared dataset, and checks of one.

    python -m facevae_jax.prepare --layout=celeba --source=DIR --resolution=64
    python -m facevae_jax.prepare verify --name=celeba --resolution=64

Layouts: `ffhq` (images1024x1024/ or thumbnails128x128/), `celeba` (img_align_celeba/ and its two lists), `folder` (any
PNG, JPEG and WebP files), each in a folder or in a .zip file that is not unpacked; `parquet` (files with a column of
images, as Hugging Face has them); `tfds` (a dataset such as lfw that TFDS has prepared under --data_dir).
"""

import dataclasses
import functools
import inspect
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from absl import flags

from facevae_jax.config import MAX_RESOLUTION, MIN_RESOLUTION, DataConfig, TrainConfig
from facevae_jax.core import command_line, named_configs, parallel
from facevae_jax.core.errors import UserError, check_choice, expand_home, some
from facevae_jax.core.files import AnyPath
from facevae_jax.data.dataset import ARRAYS
from facevae_jax.data.layouts.celeba import celeba_layout
from facevae_jax.data.layouts.ffhq import ffhq_layout
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.layouts.label_files import SUFFIXES, join_table
from facevae_jax.data.layouts.parquet import parquet_layout
from facevae_jax.data.layouts.tfds import tfds_layout
from facevae_jax.data.layouts.types import TRAIN, VALIDATION, Layout
from facevae_jax.data.prepared import builder, reading, verification
from facevae_jax.data.prepared.locations import is_remote
from facevae_jax.data.sources.images import RESIZES, Crop

DEFAULT_DATA_DIR = DataConfig.data_dir
RESERVED = (DataConfig.name, ARRAYS)  # of the drawn faces, and of images that a program gave
GENERAL_CONFIGS = {64: "ffhq64", 128: "ffhq128", 256: "ffhq256"}  # for datasets without a config of their own
MIN_STEPS = 4_000  # of training; after some hundred a face is still gray
FEW_IMAGES = 1_000
SMALL_BATCHES = (16, 32)  # images, of a dataset that gives fewer steps: at most `FEW_IMAGES`, or more
FEW_IMAGES_FACTOR = 100_000.0  # r_loss_factor at 64x64: a noise of sqrt(D / (2 x factor)) = 0.25 of a pixel's range
EVALUATIONS = 20  # of such a run


class Options(NamedTuple):
    """What a layout may need beside its source."""

    resolution: int
    data_dir: str
    features: pathlib.Path | None = None  # the ffhq-features-dataset
    labeled: bool = False  # by a table of the user's


# From --source and the other flags to the images. A new layout is a function and a line here.
LAYOUTS: dict[str, Callable[[str, Options], Layout]] = {
    "ffhq": lambda source, of: ffhq_layout(_path(source), resolution=of.resolution, attributes=of.features),
    "celeba": lambda source, _: celeba_layout(_path(source)),
    "folder": lambda source, of: folder_layout(_path(source), labeled=of.labeled),
    "parquet": lambda source, _: parquet_layout(_path(source)),
    "tfds": lambda source, of: tfds_layout(source, data_dir=of.data_dir),
}


def define_flags() -> None:
    """Defines the flags; not at import, so that a test or a benchmark may import this module."""
    flags.DEFINE_string("layout", "", f"what the source looks like: {', '.join(LAYOUTS)}")
    flags.DEFINE_string("source", "", "the folder or .zip file of the images, or the name of the TFDS dataset")
    flags.DEFINE_integer("resolution", 0, "pixels along one side: a power of two from 32 to 1024")
    flags.DEFINE_string("data_dir", DEFAULT_DATA_DIR, "where prepared datasets are")
    flags.DEFINE_string("name", None, "name of the dataset; by default that of the layout, or of the TFDS dataset")
    flags.DEFINE_integer("workers", None, "threads that convert images; by default one more than there are CPU cores")
    policy = "skip: leave out images that cannot be used, and list them"
    flags.DEFINE_enum("on_bad_image", "error", get_args(builder.Policy), policy)
    flags.DEFINE_bool("overwrite", False, "prepare a dataset again that exists already")
    flags.DEFINE_string("attributes", None, "your labels, a CSV or JSON file; for ffhq also the ffhq-features-dataset")
    flags.DEFINE_string("crop", "", "LEFT,TOP,RIGHT,BOTTOM: a square in pixels; by default the layout's own crop")
    flags.DEFINE_enum("resize", "lanczos", list(RESIZES), "the filter that resizes; see docs/data.md")
    flags.DEFINE_string("beam_options", None, "convert by Apache Beam with these options, maybe empty: docs/beam.md")
    flags.DEFINE_string("output", None, "for verify: where its report is written; by default in the dataset's folder")


def main(arguments: list[str]) -> int | None:
    """Reads the flags and prepares the dataset, or verifies it."""
    command: Callable[..., Any] = verify if arguments == ["verify"] else prepare
    if command is prepare and arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --source={arguments[0]}.")
    if command is prepare and flags.FLAGS.output is not None:
        raise UserError("--output is for verify: leave it out.")
    try:
        command(**{name: flags.FLAGS[name].value for name in inspect.signature(command).parameters})
    except KeyboardInterrupt:
        resumes = ": the same command resumes from what is done" if command is prepare else ""
        print(f"stopped{resumes}.", file=sys.stderr)
        return 130
    return None


def verify(*, name: str | None, resolution: int, data_dir: str, output: str | None = None) -> None:
    """Checks a prepared dataset and prints what was found. The arguments are the flags.

    Raises UserError: there is no such dataset, something is wrong with it, or `output` cannot be written to.
    """
    datasets = reading.prepared_datasets(expand_home(data_dir, name="--data_dir"))
    directory = datasets.get(name or "", {}).get(resolution)
    if directory is None:
        known = ", ".join(f"--name={name} --resolution={size}" for name, sizes in datasets.items() for size in sizes)
        raise UserError(
            f"--name={name or ''} --resolution={resolution or ''}: no such dataset is prepared in "
            f"--data_dir={data_dir!r}; choose one of: {known or 'none, so prepare it first'}."
        )
    written = expand_home(output, name="--output") if output else directory / "verification"
    report = verification.verify_dataset(directory, output=written, threads=parallel.available_cpus() + 1)
    for line in report.summary:
        print(line)
    print(f"written: {written} (report.json, duplicates.jsonl and a contact sheet of every split)")
    if problems := report.problems:
        only_stores = len(problems) == sum(map(bool, report.stores.values()))
        delete = f"delete {directory / 'pixels'}, which the next run makes again"
        remedy = delete if only_stores else "prepare it again with --overwrite"  # which removes the stores too
        raise UserError(
            f"{directory}: {len(problems)} problem{'s' * (len(problems) > 1)} ({some(problems)}), all are listed in "
            f"{written / verification.REPORT}: {remedy}."
        )
    print(f"whole: {directory}")


def prepare(
    source: str | os.PathLike[str],
    *,
    layout: str,
    resolution: int,
    name: str | None = None,
    data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR,
    attributes: str | os.PathLike[str] | None = None,
    on_bad_image: builder.Policy = "error",
    overwrite: bool = False,
    workers: int | None = None,
    crop: str = "",
    resize: str = "lanczos",
    beam_options: str | None = None,
) -> AnyPath:
    """Makes a dataset from images, like `python -m facevae_jax.prepare`, and prints what it did.

    An interrupted call resumes where it stopped when it is made again; a finished one returns at once.

    Args:
      source: the folder or .zip file of the images; for the layout `tfds` the name of the dataset.
      layout: what the source looks like: `ffhq`, `celeba`, `folder`, `parquet` or `tfds`.
      resolution: R, pixels along one side: a power of two from 32 to 1024. Images are stored as uint8 [R, R, 3].
      name: of the dataset, for `config.data.name`; that of the layout or of the TFDS dataset by default.
      data_dir: the folder of all prepared datasets, for `config.data.data_dir`.
      attributes: a CSV or JSON file of labels, joined by file name; for `ffhq` also the ffhq-features-dataset.
      on_bad_image: what to do with images that cannot be read: `error` writes no dataset, `skip` leaves them out and
        lists them in the dataset's bad_images.jsonl.
      overwrite: replace a dataset that exists already.
      workers: threads that convert images; one more than there are CPU cores by default.
      crop: `LEFT,TOP,RIGHT,BOTTOM`, the square of pixels that is kept of each image; "" for the crop of the layout.
      resize: the filter, `lanczos` or `bilinear`.
      beam_options: convert by Apache Beam with these options instead of threads; "" for Beam's defaults.

    Returns:
      The folder of the dataset.

    Raises:
      UserError: an argument is impossible, the images are not what the layout expects, or they cannot be used.
    """
    source, data_dir = os.fspath(source), os.fspath(data_dir)
    attributes = None if attributes is None else os.fspath(attributes)
    check_choice(layout, tuple(LAYOUTS), name="--layout")
    check_choice(on_bad_image, get_args(builder.Policy), name="--on_bad_image")
    check_choice(resize, tuple(RESIZES), name="--resize")
    if not source:
        raise UserError("--source is missing: give the folder or .zip file of the images, or the TFDS dataset's name.")
    if resolution & (resolution - 1) or not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise UserError(
            f"--resolution={resolution or ''}: choose a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}."
        )
    name = name or (source.partition("/")[0] if layout == "tfds" else layout)
    if not re.fullmatch(r"[a-z][a-z0-9_]{,63}", name) or name in RESERVED:
        raise UserError(
            f"--name={name[:80]!r}: use a-z, 0-9 and _, a letter first, 64 at most, and none of {', '.join(RESERVED)}."
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers}: choose at least 1.")
    if attributes and layout != "ffhq" and not attributes.lower().endswith(SUFFIXES):
        raise UserError(f"--attributes={attributes!r}: give a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if is_remote(data_dir) and beam_options is None:
        raise UserError(f"--data_dir={data_dir!r} is not a folder of this machine: choose one, or add --beam_options=")
    if is_remote(data_dir) and layout == "tfds":
        raise UserError(f"--data_dir={data_dir!r}: --layout=tfds reads its source there: choose a folder.")

    target = reading.dataset_directory(data_dir, name=name, resolution=resolution)
    how: dict[str, Any] = {"attributes": attributes, "crop": crop, "resize": resize}
    read = functools.partial(open_layout, layout, source, resolution=resolution, data_dir=data_dir, **how)
    if reading.is_published(target) and not overwrite:
        refuse_other_source(target, layout=layout, source=source)
        there = [given for given in (source, attributes) if given]
        if layout != "tfds" and all(_path(given).exists() for given in there):  # they may be gone since
            refuse_other_files(target, read())
        counts = describe_counts(reading.split_sizes(target))
        again = "delete it to prepare it again" if is_remote(data_dir) else "--overwrite prepares it again"
        print(f"already prepared: {target} ({counts}); {again}.")
    else:
        found = read()
        if TRAIN not in found.splits:
            counts = describe_counts({split: len(images) for split, images in found.splits.items()})
            raise UserError(f"--source={source!r} has no images to train on ({counts}): add some of the split train.")
        for note in found.notes:
            print(f"note: {note}")
        if beam_options is None:
            workers = workers or parallel.available_cpus() + 1  # a thread that waits for the GIL leaves its core idle
            convert = functools.partial(builder.prepare_dataset, workers=workers)
        else:
            from facevae_jax.data.prepared import beam  # needs the extra `beam`

            convert = functools.partial(beam.prepare_dataset, workers=workers, options=beam_options)
        result = convert(found, data_dir=data_dir, name=name, resolution=resolution, on_bad_image=on_bad_image)
        report(result, resolution=resolution, had_validation=VALIDATION in found.splits)
    images = reading.split_sizes(target).get(TRAIN, 0)
    print(f"next: {next_command(data_dir, name=name, resolution=resolution, images=images)}")
    return target


def report(result: builder.Prepared, *, resolution: int, had_validation: bool = False) -> None:
    """Prints what was prepared."""
    if result.reused:
        print(f"note: {result.reused} images were reused from an interrupted run.")
    if result.bad and not result.images.get(VALIDATION) and had_validation:
        print("note: all images for validation were left out: the run will be evaluated on the training images.")
    if result.bad:
        print(f"note: {result.bad} images were left out: see {result.directory / builder.BAD_IMAGES}.")
    if result.enlarged:
        total = sum(result.images.values())
        print(f"note: {result.enlarged} of {total} images are smaller than {resolution} pixels and were enlarged.")
    counts = describe_counts(result.images)
    print(f"prepared: {result.directory} ({counts}; {result.images_per_second:.0f} images/s)")


def refuse_other_source(target: AnyPath, *, layout: str, source: str) -> None:
    """Raises a UserError if the dataset at `target` was prepared from something else."""
    metadata = reading.read_metadata(target)
    kind, held = metadata.get("layout"), metadata.get("source")
    # FFHQ and CelebA are the same wherever they are; folders and TFDS datasets differ by name.
    own = builder.printable(_path(source).name)
    named = {"folder": own, "parquet": own, "tfds": source}.get(layout, held)
    if (kind, held) != (layout, named):
        raise UserError(
            f"{target} was prepared from {held!r} (--layout={kind}), not {named!r} (--layout={layout}): "
            "--name=NAME prepares another dataset, --overwrite replaces this one."
        )


def refuse_other_files(target: AnyPath, layout: Layout) -> None:
    """Raises a UserError if the dataset at `target` lacks labels that a layout has now, or has other images."""
    metadata = reading.read_metadata(target)
    known = {attribute["name"] for attribute in metadata.get("attributes", ())}
    reason = ""
    if missing := [attribute.name for attribute in layout.attributes if attribute.name not in known]:
        reason = f"without the labels {some(missing)}"
    elif metadata.get("files") not in (None, builder.hash_of_names(layout)):  # None of an earlier version
        reason = "from other files: some were added, removed or renamed, or are of another folder"
    made = {"crop": layout.crop.description, "resize": RESIZES[layout.resize]}
    for key, value in made.items():
        if metadata.get(key, value) != value:
            reason = f"with another {key} ({metadata[key]})"
    if reason:
        raise UserError(f"{target} was prepared {reason}: --overwrite prepares it again, --name=NAME another dataset.")


def open_layout(
    layout: str,
    source: str,
    *,
    resolution: int,
    data_dir: str = DEFAULT_DATA_DIR,
    attributes: str | None = None,
    crop: str = "",
    resize: str = "lanczos",
) -> Layout:
    """The images of `source`. The arguments are the flags.

    Raises UserError: they are not what the layout expects, or the attributes cannot be read, or no such square exists.
    """
    square = _square(crop) if crop else None
    labels = _path(attributes, name="--attributes") if attributes else None
    joined = attributes is not None and attributes.lower().endswith(SUFFIXES)  # otherwise the ffhq-features-dataset
    options = Options(resolution, data_dir, features=None if joined else labels, labeled=joined)
    found = dataclasses.replace(LAYOUTS[layout](source, options), resize=resize)
    found = dataclasses.replace(found, crop=square) if square else found
    return join_table(found, labels) if labels and joined else found


def _square(text: str) -> Crop:
    """The crop that `--crop` means."""
    found = re.fullmatch(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})", text)
    left, top, right, bottom = map(int, found.groups()) if found else (0, 0, 0, 0)
    if not 0 < right - left == bottom - top:
        raise UserError(f"--crop={text[:80]!r}: give LEFT,TOP,RIGHT,BOTTOM of a square, such as 15,40,163,188.")
    return Crop(f"{right - left}x{right - left} pixels: left {left}, top {top}", box=(left, top, right, bottom))


def _path(given: str, *, name: str = "--source") -> pathlib.Path:
    """The absolute path, without `~` and `..`, so that its last part is a name."""
    return pathlib.Path(os.path.abspath(expand_home(given, name=name)))  # noqa: PTH100 - resolve() follows links


def describe_counts(images: dict[str, int]) -> str:
    """For example `16000 train, 2000 validation`."""
    return ", ".join(f"{count} {split}" for split, count in images.items())


def next_command(data_dir: str, *, name: str, resolution: int, images: int) -> str:
    """The command that trains on the dataset of `images` training images."""
    own, overrides = f"{name}{resolution}", list[str]()
    trains_on_it = own in named_configs.names() and named_configs.read(own).data.name == name
    config = named_configs.flag(own) if trains_on_it else None
    if config is None:
        nearest = min((size for size in GENERAL_CONFIGS if size >= resolution), default=max(GENERAL_CONFIGS))
        config = f"--config={GENERAL_CONFIGS[nearest]}"
        overrides = [f"--config.data.name={name}"]
        overrides += [f"--config.data.resolution={resolution}"] * (resolution != nearest)
    if data_dir != DEFAULT_DATA_DIR:
        overrides.append(f"--config.data.data_dir={data_dir}")
    overrides += [f"--config.{name}={value}" for name, value in settings_for(images, resolution).items()]
    words = [config, *overrides, f"--workdir=/tmp/{name}{resolution}"]
    return shlex.join(["python", "-m", "facevae_jax.main", *words])


def settings_for(images: int, resolution: int) -> dict[str, int | float | str]:
    """Settings for few images, so that there are steps enough to learn a face; none for many.

    A decoder learns a few hundred faces by heart. Its variance is then far too small for the errors of other faces, and
    the validation loss grows from the first minute on; with a fixed variance it falls.
    """
    own = images // TrainConfig.batch_size * TrainConfig.epochs
    if not images or own >= 0.9 * MIN_STEPS:  # as for 16,000 faces of CelebA, whose config makes more steps yet
        return {}
    few = images <= FEW_IMAGES
    batch = min(SMALL_BATCHES[not few], 1 << (images.bit_length() - 1))  # a power of two, for many devices
    epochs = -(-MIN_STEPS // (images // batch))
    settings: dict[str, int | float | str] = {
        "train.batch_size": batch,
        "train.epochs": epochs,
        "train.evaluate_every_epochs": max(1, epochs // EVALUATIONS),
    }
    if few:
        settings["objective.likelihood"] = "mse"
        settings["objective.r_loss_factor"] = FEW_IMAGES_FACTOR * (resolution / 64) ** 2
    return settings


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
