"""Prepared datasets: writing one with TFDS, finding it, and reading it without TensorFlow.

A dataset lies in `data_dir/NAME/RESOLUTION/VERSION/`: ArrayRecord files by split, whose row i is the i-th image in the
order of the layout, with the features `image` (PNG), `name` and, where the layout has any, `attributes` (float32; NaN
where unknown). TFDS is imported where it is used: synthetic runs work where it is not installed.
"""

import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from tqdm import tqdm

import facevae_jax
from facevae_jax.config import CHANNELS
from facevae_jax.data import images, records
from facevae_jax.data.folders import some
from facevae_jax.data.layouts import Layout
from facevae_jax.data.parallel import map_in_order
from facevae_jax.errors import UserError, expand_home, make_writable_directory

VERSION = "1.0.0"
SHARD_BYTES = 2**28  # of decoded pixels
READ_ROWS = 16  # rows fetched and decoded together

Example = tuple[int, dict[str, Any]]


class Prepared(NamedTuple):
    """What a preparation wrote."""

    directory: pathlib.Path
    images: dict[str, int]  # by split
    enlarged: int  # images that were smaller than the resolution
    images_per_second: float


def dataset_directory(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> pathlib.Path:
    """Where this version of the project writes the dataset."""
    return expand_home(data_dir, name="data_dir") / name / str(resolution) / VERSION


def prepare_dataset(
    layout: Layout, *, data_dir: str | os.PathLike[str], name: str, resolution: int, workers: int
) -> Prepared:
    """Converts every image of `layout` and writes the dataset; one that is there already is replaced at the end.

    The bytes written do not depend on the number of workers. Nothing is published unless all images were converted.

    Raises:
      UserError: images cannot be decoded, or `data_dir` cannot be written to.
    """
    target = dataset_directory(data_dir, name=name, resolution=resolution)
    make_writable_directory(target.parent, name="--data_dir")
    aside = target.parent / f"incomplete.{secrets.token_hex(8)}"
    conversion = _Conversion(layout, images.Task(layout.crop, resolution), workers)
    try:
        # TFDS's own overwriting deletes the old dataset first; this one stays readable until the new one is whole.
        written = _write(conversion, data_dir=aside, name=name)
        _flush(written)
        _replace(target, written)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    seconds = max(conversion.seconds, 1e-9)
    counts = {split: len(members) for split, members in layout.splits.items()}
    return Prepared(target, counts, conversion.enlarged, sum(counts.values()) / seconds)


class _Conversion:
    """One pass over the images of a layout, consumed shard by shard in the order of the layout."""

    def __init__(self, layout: Layout, task: images.Task, workers: int):
        self.layout, self.task, self.workers = layout, task, workers
        self.enlarged = 0
        self.seconds = 0.0
        self.stream = self._examples()

    def shards(self) -> dict[str, list[Callable[[], Iterator[Example]]]]:
        """Generators of the examples of every shard, by split. They share one stream: TFDS runs them in this order."""
        per_shard = max(1, SHARD_BYTES // (CHANNELS * self.task.resolution**2))
        return {
            split: [
                functools.partial(itertools.islice, self.stream, min(per_shard, len(members) - start))
                for start in range(0, len(members), per_shard)
            ]
            for split, members in self.layout.splits.items()
        }

    def _examples(self) -> Generator[Example, None, None]:
        everything = [image for members in self.layout.splits.values() for image in members]
        names = [attribute.name for attribute in self.layout.attributes]
        failures: list[str] = []
        start = time.monotonic()
        converted = images.convert_all((image.file for image in everything), self.task, threads=self.workers)
        # Without a terminal there is no bar: it would fill a log file.
        with contextlib.closing(converted), tqdm(total=len(everything), unit="image", disable=None) as progress:
            for row, (image, result) in enumerate(zip(everything, converted, strict=True)):
                progress.update()
                self.enlarged += result.enlarged
                if result.failure:
                    failures.append(f"{image.name}: {result.failure}")
                if failures and row == len(everything) - 1:  # only now are all of them known
                    raise UserError(
                        f"{len(failures)} of {len(everything)} images cannot be decoded ({some(failures)}): "
                        "replace or remove them, and run the same command again; nothing was written."
                    )
                self.seconds = time.monotonic() - start
                example: dict[str, Any] = {"image": result.png, "name": os.fsencode(image.name)}
                if names:
                    example["attributes"] = dict(zip(names, image.attributes, strict=True))
                yield row, example
                example.clear()  # written by now, but TFDS keeps it to count the shard's examples at the end


def _write(conversion: _Conversion, *, data_dir: pathlib.Path, name: str) -> pathlib.Path:
    """Writes the dataset under `data_dir` and returns its directory."""
    tfds = records.import_tfds()
    layout, resolution = conversion.layout, conversion.task.resolution
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=(resolution, resolution, CHANNELS), encoding_format="png"),
        "name": tfds.features.Text(doc="path of the source file"),
    }
    if layout.attributes:
        features["attributes"] = {attribute.name: np.float32 for attribute in layout.attributes}

    # Not a GeneratorBasedBuilder: that one keeps a whole split in memory, and from 1 GB on it needs TensorFlow.
    class FaceBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg, name-defined]
        VERSION = tfds.core.Version(VERSION)
        url_infos = None  # nothing is downloaded; TFDS's own lookup needs the package importlib_resources
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=str(resolution), description=layout.crop.description)]  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{layout.source}: {layout.crop.description}, {resolution}x{resolution} pixels.",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(_provenance(layout, resolution)),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager):
            return conversion.shards()

    FaceBuilder.name = name  # TFDS would name the dataset after the class
    # TFDS prints what the caller says better.
    with contextlib.closing(conversion.stream), contextlib.redirect_stdout(io.StringIO()):
        builder = FaceBuilder(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def _provenance(layout: Layout, resolution: int) -> dict[str, Any]:
    """Where the pixels come from. No absolute path: datasets are shared."""
    return {
        "layout": layout.kind,
        "source": layout.source,
        "resolution": resolution,
        "crop": layout.crop.description,
        "resize": images.RESIZE,
        "colour": "8-bit RGB, transparency over white, EXIF orientation applied, ICC profiles ignored",
        "attributes": [attribute._asdict() for attribute in layout.attributes],
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


def _replace(target: pathlib.Path, written: pathlib.Path) -> None:
    if target.exists():
        old = written.with_name("old")
        target.rename(old)  # goes away with the directory it is in
    written.rename(target)


def prepared_datasets(data_dir: str | os.PathLike[str]) -> dict[str, dict[int, pathlib.Path]]:
    """The newest version of every prepared dataset under `data_dir`, by name and resolution.

    The remains of a run that was killed are not among them.
    """
    found: dict[str, dict[int, tuple[tuple[int, ...], pathlib.Path]]] = {}
    for info in sorted(expand_home(data_dir, name="data_dir").glob(f"*/*/*/{records.INFO_FILE}")):
        directory = info.parent
        name, resolution, version = directory.parts[-3:]
        if re.fullmatch(r"\d+\.\d+\.\d+", version) and resolution.isdecimal():
            candidate = (tuple(map(int, version.split("."))), directory)
            resolutions = found.setdefault(name, {})
            resolutions[int(resolution)] = max(candidate, resolutions.get(int(resolution), candidate))
    return {name: {size: path for size, (_, path) in sorted(sizes.items())} for name, sizes in found.items()}


def find_dataset(data_dir: str | os.PathLike[str], *, name: str, resolution: int) -> pathlib.Path:
    """The directory of the newest version of a prepared dataset.

    Raises:
      UserError: it is not prepared, or not at this resolution.
    """
    datasets = prepared_datasets(data_dir)
    if resolution in datasets.get(name, {}):
        return datasets[name][resolution]
    prepare = (
        f"python -m facevae_jax.prepare --layout=... --source=... --name={name} "
        f"--resolution={resolution} --data_dir={data_dir}"
    )
    if name in datasets:
        sizes = list(datasets[name])
        raise UserError(
            f"config.data.resolution={resolution}: {name!r} is prepared in config.data.data_dir={str(data_dir)!r} at "
            f"{', '.join(map(str, sizes))}: use --config.data.resolution={sizes[-1]}, or prepare it: {prepare}"
        )
    known = f"there are: {', '.join(datasets)}" if datasets else "no dataset is prepared there"
    raise UserError(
        f"config.data.name={name!r} (config.data.resolution={resolution}) is not prepared in "
        f"config.data.data_dir={str(data_dir)!r}; {known}: prepare it: {prepare}"
    )


def split_sizes(directory: pathlib.Path) -> dict[str, int]:
    """The number of images in every split of a prepared dataset.

    Raises:
      UserError: the dataset cannot be read.
    """
    return {name: split.num_examples for name, split in records.open_info(directory).info.splits.items()}


def read_metadata(directory: pathlib.Path) -> dict[str, Any]:
    """What `prepare_dataset` noted about where the images come from, and `attributes`: their names and kinds.

    Raises:
      UserError: the dataset cannot be read.
    """
    try:
        return json.loads((pathlib.Path(directory) / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no readable metadata.json: prepare the dataset anew.") from error


def read_images(directory: pathlib.Path, split: str) -> Iterator[UInt8[np.ndarray, "r r 3"]]:
    """The images of a split, in row order.

    Raises:
      UserError: the split is not there, or cannot be read.
    """
    decode = functools.partial(_decode, directory=directory, split=split)
    return _read(directory, split, decode)


def _decode(example: bytes, *, directory: pathlib.Path, split: str) -> UInt8[np.ndarray, "r r 3"]:
    try:
        with Image.open(io.BytesIO(records.feature_bytes(example, "image")), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow and protobuf raise many kinds for damaged bytes
        raise UserError(
            f"{directory}: the split {split!r} has a damaged image ({records.reason(error)}): prepare it anew."
        ) from error


def _read(directory: pathlib.Path, split: str, decode: Callable[[bytes], Any]) -> Iterator[Any]:
    """`decode` of every serialized example of a split in row order, decoded by threads: Pillow releases the GIL."""
    source = records.open_split(pathlib.Path(directory), split)

    def decode_rows(start: int) -> list[Any]:
        rows = range(start, min(start + READ_ROWS, len(source)))
        return [decode(example) for example in source.__getitems__(rows)]

    starts = range(0, len(source), READ_ROWS)
    for results in map_in_order(decode_rows, starts, threads=os.cpu_count() or 1):
        yield from results


def read_attributes(directory: pathlib.Path, split: str) -> dict[str, Float32[np.ndarray, " n"]]:
    """The attributes of a split by name, in row order; NaN where unknown. Empty where the dataset has none.

    Raises:
      UserError: the split is not there, or cannot be read.
    """
    names = [attribute["name"] for attribute in read_metadata(directory)["attributes"]]
    if not names:
        return {}

    def values(example: bytes) -> list[float]:
        features = records.features_of(example)
        return [features[f"attributes/{name}"].float_list.value[0] for name in names]

    table = np.array(list(_read(directory, split, values)), np.float32)
    return {name: table[:, column].copy() for column, name in enumerate(names)}
