"""The faces of a run as one object, drawn by this project or prepared.

    dataset = open_dataset(config.data)
    dataset.sizes                          # {"train": 16000, "validation": 2000}
    images = dataset.images("train")       # uint8 [16000, R, R, 3], memory-mapped
    labels = dataset.labels("train")       # one row for each image

Opening costs nothing: a dataset is looked for, or fetched from its bucket, when something is asked of it.
"""

import abc
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError, expand_home
from facevae_jax.core.files import reason
from facevae_jax.data.drawn import synthetic
from facevae_jax.data.layouts.types import TRAIN, VALIDATION, Attribute
from facevae_jax.data.prepared import reading
from facevae_jax.data.prepared.cache import TRAINED, local_dataset
from facevae_jax.data.prepared.locations import is_remote
from facevae_jax.data.store import gather_rows, open_store

VALIDATION_START = 2**32  # index of the first drawn validation face: no training set reaches it
DRAWN_AT_ONCE = 256  # faces
ARRAYS = "arrays"  # config.data.name of images that a program gave
MIN_VALIDATION_IMAGES = 10  # fewer choose no checkpoint


class AttributeTable(NamedTuple):
    """Labels of the rows of a split."""

    attributes: tuple[Attribute, ...]
    values: Float32[np.ndarray, "n a"]  # in the order of the images; NaN where unknown

    def column(self, name: str) -> Float32[np.ndarray, " n"]:
        """The values of one attribute. Raises UserError: there is no such attribute."""
        names = [attribute.name for attribute in self.attributes]
        if name not in names:
            raise UserError(f"the images have no attribute {name!r}; there are: {', '.join(names) or 'none'}.")
        return self.values[:, names.index(name)]


class Dataset(abc.ABC):
    """Images by split, with their labels and names. Every member raises a UserError if the data cannot be read."""

    name: str  # `synthetic`, or that of the prepared dataset

    @property
    @abc.abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """The number of images of each split that has any."""

    @property
    def evaluation_split(self) -> str:
        """The split that runs are evaluated on: `validation`, or `train` if that has too few images.

        The scores of a few images are too noisy to choose a checkpoint by.
        """
        return VALIDATION if self.sizes.get(VALIDATION, 0) >= MIN_VALIDATION_IMAGES else TRAIN

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Text that differs as soon as an image or a label does."""

    @property
    @abc.abstractmethod
    def attributes(self) -> tuple[Attribute, ...]:
        """What the images are labeled with."""

    @abc.abstractmethod
    def images(self, split: str) -> UInt8[np.ndarray, "n r r 3"]:
        """All images of a split, memory-mapped; the first call draws or decodes them.

        Raises UserError: there is no such split, or no room for its images.
        """

    @abc.abstractmethod
    def labels(self, split: str) -> AttributeTable:
        """The attributes of a split."""

    @abc.abstractmethod
    def names(self, split: str) -> tuple[str, ...]:
        """The file that each image was prepared from, or `train_7` for row 7 of `train`."""

    def read_rows(self, split: str, rows: Sequence[int]) -> UInt8[np.ndarray, "n r r 3"]:
        """A copy of some images of a split.

        Raises UserError: there is no such split, or no such row; it then names `--rows`.
        """
        images = self.images(split)
        if wrong := [row for row in rows if not 0 <= row < len(images)]:
            raise UserError(f"--rows={wrong[0]}: the split {split!r} has rows 0 to {len(images) - 1}.")
        return gather_rows(images, np.asarray(rows, np.int64))

    @property
    @abc.abstractmethod
    def preparation(self) -> Mapping[str, str]:
        """How the images were made from files: `crop` and `resize`."""

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """What a report says about the data, as (what, value); never raises a UserError."""

    def _size(self, split: str) -> int:
        if split not in self.sizes:
            raise UserError(f"--split={split!r}: the data have only {' and '.join(sorted(self.sizes)) or 'no split'}.")
        return self.sizes[split]


def open_dataset(config: DataConfig) -> Dataset:
    """The configured dataset. This is the one place that asks what kind it is."""
    return {Drawn.name: Drawn, ARRAYS: Arrays}.get(config.name, Prepared)(config)


class Drawn(Dataset):
    """Faces that the project draws."""

    name = DataConfig.name
    attributes = tuple(Attribute(attribute.name, attribute.kind) for attribute in synthetic.ATTRIBUTES)

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    @property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102
        return {TRAIN: self._config.synthetic_train_images, VALIDATION: self._config.synthetic_validation_images}

    @property
    def fingerprint(self) -> str:  # noqa: D102
        return f"{synthetic.VERSION} {self.sizes}"

    def images(self, split: str) -> UInt8[np.ndarray, "n r r 3"]:  # noqa: D102
        indices, resolution = self._indices(split), self._config.resolution
        place = self._config.cache_dir if is_remote(self._config.data_dir) else self._config.data_dir
        folder = expand_home(place, name="config.data.data_dir") / self.name / str(resolution) / synthetic.VERSION

        def draw() -> Iterator[np.ndarray]:
            for first in range(0, len(indices), DRAWN_AT_ONCE):
                yield synthetic.faces(indices[first : first + DRAWN_AT_ONCE], resolution=resolution)

        file = f"{split}-{len(indices)}.npy"
        inside = pathlib.Path(self.name, str(resolution), synthetic.VERSION, file)
        elsewhere = functools.partial(_cached, self._config, inside)
        return open_store(folder / file, (len(indices), resolution), draw, verb="drawing", elsewhere=elsewhere)

    def labels(self, split: str) -> AttributeTable:  # noqa: D102
        values = synthetic.attributes(self._indices(split))
        return AttributeTable(self.attributes, np.stack([values[label.name] for label in self.attributes], axis=1))

    def names(self, split: str) -> tuple[str, ...]:  # noqa: D102
        return tuple(f"{split}_{row}" for row in range(self._size(split)))

    @property
    def preparation(self) -> Mapping[str, str]:  # noqa: D102
        return {"crop": "drawn", "resize": "drawn"}

    def describe(self) -> list[tuple[str, str]]:  # noqa: D102
        return [("Images", _counts(self.sizes)), ("Source", "faces that the project draws")]

    def _indices(self, split: str) -> Int[np.ndarray, " n"]:
        """Which of the drawn faces are the rows of a split."""
        return np.arange(self._size(split)) + (VALIDATION_START if split == VALIDATION else 0)


def stored_at(data_dir: pathlib.Path, split: str) -> pathlib.Path:
    """Where the images of a split are kept that a program gave."""
    return data_dir / ARRAYS / f"{split}.npy"


class Arrays(Dataset):
    """Images that a program gave, which `arrays.keep` wrote into the workdir of the run."""

    name = ARRAYS
    attributes = ()

    def __init__(self, config: DataConfig) -> None:
        self._directory = expand_home(config.data_dir, name="config.data.data_dir")

    @functools.cached_property
    def _records(self) -> Mapping[str, Any]:
        """What the store of each split says of itself."""
        files = {split: stored_at(self._directory, split).with_suffix(".json") for split in TRAINED}
        try:
            found = {split: json.loads(file.read_bytes()) for split, file in files.items() if file.exists()}
            _ = [(record["shape"][0], record["sha256"]) for record in found.values()]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            message = f"cannot be read ({reason(error)}): give the run its images again."
            raise UserError(f"config.data.data_dir={str(self._directory)!r} {message}") from error
        if TRAIN not in found:
            raise UserError(
                f"config.data.data_dir={str(self._directory)!r} has no images of this run: move the folder back, or "
                "give them again to facevae_jax.train(config, workdir, images=...)."
            )
        return found

    @property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102
        return {split: record["shape"][0] for split, record in self._records.items()}

    @property
    def fingerprint(self) -> str:  # noqa: D102
        return " ".join(record["sha256"] for record in self._records.values())

    def images(self, split: str) -> UInt8[np.ndarray, "n r r 3"]:  # noqa: D102
        self._size(split)
        count, resolution = self._records[split]["shape"][:2]
        return open_store(stored_at(self._directory, split), (count, resolution), lambda: (), verb="reading")

    def labels(self, split: str) -> AttributeTable:  # noqa: D102
        return AttributeTable((), np.empty((self._size(split), 0), np.float32))

    def names(self, split: str) -> tuple[str, ...]:  # noqa: D102
        return tuple(f"{split}_{row}" for row in range(self._size(split)))

    @property
    def preparation(self) -> Mapping[str, str]:  # noqa: D102
        return {"crop": "given", "resize": "given"}

    def describe(self) -> list[tuple[str, str]]:  # noqa: D102
        try:
            return [("Images", _counts(self.sizes)), ("Source", "arrays that a program gave")]
        except UserError as error:
            return [("Images", f"not on this machine: {error}")]


class Prepared(Dataset):
    """A dataset that `facevae_jax.prepare` has written, in a folder or in a bucket."""

    def __init__(self, config: DataConfig) -> None:
        self.name = config.name
        self._config = config

    @functools.cached_property
    def directory(self) -> pathlib.Path:
        """The dataset's folder on this machine. A dataset in a bucket is fetched first.

        Raises UserError: the dataset is not prepared, or cannot be fetched.
        """
        return local_dataset(self._config)

    @functools.cached_property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102
        return {split: size for split, size in reading.split_sizes(self.directory).items() if size}

    @functools.cached_property
    def fingerprint(self) -> str:  # noqa: D102
        return reading.fingerprint(self.directory)

    @functools.cached_property
    def attributes(self) -> tuple[Attribute, ...]:  # noqa: D102
        described = reading.read_metadata(self.directory)["attributes"]
        return tuple(Attribute(entry["name"], entry["kind"], tuple(entry.get("categories", ()))) for entry in described)

    def images(self, split: str) -> UInt8[np.ndarray, "n r r 3"]:  # noqa: D102
        directory, size = self._directory_with(split), (self._size(split), self._config.resolution)

        def decode() -> Iterator[np.ndarray]:
            return (image[None] for image in reading.read_images(directory, split))

        content = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        place = functools.partial(_cached, self._config, pathlib.Path(self.name, content, f"{split}.npy"))
        return open_store(directory / "pixels" / f"{split}.npy", size, decode, verb="decoding", elsewhere=place)

    def labels(self, split: str) -> AttributeTable:  # noqa: D102
        names, directory = [attribute.name for attribute in self.attributes], self._directory_with(split)
        none = np.empty((self._size(split), 0), np.float32)
        return AttributeTable(self.attributes, reading.read_attributes(directory, split, names) if names else none)

    def names(self, split: str) -> tuple[str, ...]:  # noqa: D102
        return tuple(reading.read_names(self._directory_with(split), split))

    @property
    def preparation(self) -> Mapping[str, str]:  # noqa: D102
        notes = reading.read_metadata(self.directory)
        return {key: str(notes.get(key, "unknown")) for key in ("crop", "resize")}

    def describe(self) -> list[tuple[str, str]]:  # noqa: D102
        try:
            sizes, notes = self.sizes, reading.read_metadata(self.directory)
        except UserError as error:
            return [("Images", f"not on this machine: {error}")]
        titles = {key: key.capitalize() for key in notes if key != "resolution"} | {"versions": "Prepared with"}
        return [
            ("Images", _counts(sizes)),
            *((title, _in_words(notes[key])) for key, title in titles.items() if key in notes),
        ]

    def _directory_with(self, split: str) -> pathlib.Path:
        """The dataset's folder, in which the files of `split` are."""
        self._size(split)
        return self.directory if split in TRAINED else local_dataset(self._config, [split])


def _cached(config: DataConfig, inside: pathlib.Path) -> pathlib.Path:
    """Where the pixel store of data that belong to another user is."""
    return expand_home(config.cache_dir, name="config.data.cache_dir") / "pixels" / inside


def _counts(sizes: Mapping[str, int]) -> str:
    """For example `16,000 train, 2,000 validation`."""
    return ", ".join(f"{count:,} {split}" for split, count in sizes.items())


def _in_words(value: Any) -> str:
    """A value of a dataset's metadata."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(str(part["name"]) if isinstance(part, Mapping) else str(part) for part in value) or "none"
    return str(value)
