"""The pixel store: a split decoded once to uint8 [N, R, R, 3] in a memory-mapped `.npy` file.

Beside each `train.npy` lies a `train.json` with its checksum; it is written last, so a store without one is made anew
from the dataset. A store that no longer agrees with its checksum is refused.
"""

import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from facevae_jax.config import CHANNELS, DataConfig
from facevae_jax.data import dataset, synthetic
from facevae_jax.data.cache import fetch_dataset, local_dataset
from facevae_jax.data.locations import is_remote
from facevae_jax.errors import UserError, expand_home, make_writable_directory
from facevae_jax.files import atomic_writer, locked, write_json
from facevae_jax.progress import progress_bar

TRAIN, VALIDATION = "train", "validation"
SYNTHETIC = "synthetic"
SYNTHETIC_VALIDATION_START = 2**32  # index of the first validation face: no training set reaches it
SYNTHETIC_CHUNK = 256  # faces drawn at a time
HASH_BLOCK_BYTES = 2**24


class Splits(NamedTuple):
    """The images of a run, memory-mapped."""

    train: UInt8[np.ndarray, "n r r 3"]
    evaluation: UInt8[np.ndarray, "m r r 3"]
    evaluation_split: str  # `validation`, or `train` where the dataset has no validation images


def open_splits(config: DataConfig) -> Splits:
    """The pixel stores of the configured dataset, made first where they are missing.

    Raises:
      UserError: the dataset is not prepared at this resolution, has no training images, or cannot be written to.
    """
    if config.name == SYNTHETIC:
        return Splits(open_split(config, TRAIN), open_split(config, VALIDATION), VALIDATION)
    directory = local_dataset(config)
    sizes = dataset.split_sizes(directory)
    if not sizes.get(TRAIN):
        raise UserError(f"config.data.name={config.name!r}: {directory} has no training images: prepare it anew.")
    evaluation_split = VALIDATION if sizes.get(VALIDATION) else TRAIN
    stores = {split: _open_prepared(directory, split, sizes[split], config) for split in (TRAIN, evaluation_split)}
    return Splits(stores[TRAIN], stores[evaluation_split], evaluation_split)


def open_split(config: DataConfig, split: str) -> UInt8[np.ndarray, "n r r 3"]:
    """The pixel store of one split, made first where it is missing.

    Raises:
      UserError: the dataset is not prepared at this resolution, has no such split, or cannot be written to.
    """
    if config.name == SYNTHETIC:
        _check_split(split, (TRAIN, VALIDATION))
        place = config.cache_dir if is_remote(config.data_dir) else config.data_dir
        data_dir = expand_home(place, name="config.data.data_dir")
        return _open_synthetic(data_dir / SYNTHETIC / str(config.resolution) / synthetic.VERSION, split, config)
    directory = local_dataset(config)
    sizes = dataset.split_sizes(directory)
    _check_split(split, [name for name, size in sizes.items() if size])
    if split not in (TRAIN, VALIDATION) and is_remote(config.data_dir):  # which no run reads
        directory = fetch_dataset(config, {split: range(sizes[split])})
    return _open_prepared(directory, split, sizes[split], config)


def _check_split(split: str, names: Sequence[str]) -> None:
    if split not in names:
        raise UserError(f"--split={split!r}: the data have {' and '.join(sorted(names))} alone.")


def synthetic_rows(config: DataConfig, split: str) -> Int[np.ndarray, " n"]:
    """Which of the drawn faces are the rows of a split."""
    if split == VALIDATION:
        return SYNTHETIC_VALIDATION_START + np.arange(config.synthetic_validation_images)
    return np.arange(config.synthetic_train_images)


def _open_synthetic(directory: pathlib.Path, split: str, config: DataConfig) -> np.ndarray:
    indices = synthetic_rows(config, split)
    images = len(indices)

    def draw() -> Iterator[np.ndarray]:
        for first in range(0, images, SYNTHETIC_CHUNK):
            yield synthetic.faces(indices[first : first + SYNTHETIC_CHUNK], resolution=config.resolution)

    return open_store(directory / f"{split}-{images}.npy", (images, config.resolution), draw, verb="drawing")


def _open_prepared(directory: pathlib.Path, split: str, images: int, config: DataConfig) -> np.ndarray:
    def decode() -> Iterator[np.ndarray]:
        for image in dataset.read_images(directory, split):
            yield image[None]

    path = directory / "pixels" / f"{split}.npy"
    return open_store(path, (images, config.resolution), decode, verb="decoding")


def open_store(
    path: pathlib.Path, size: tuple[int, int], images: Callable[[], Iterable[np.ndarray]], *, verb: str
) -> UInt8[np.ndarray, "n r r 3"]:
    """The store at `path`, memory-mapped, made from `images` where it is missing.

    Args:
      path: of the `.npy` file.
      size: (images, resolution) that it must have.
      images: gives uint8 arrays [k, R, R, 3] in row order, from which the store is made.
      verb: what making it is called on the progress bar.

    Raises:
      UserError: the store is damaged, or there is no room for one.
    """
    count, resolution = size
    shape = (count, resolution, resolution, CHANNELS)
    if not _is_whole(path, shape):
        make_writable_directory(path.parent, name="config.data.data_dir")
        with locked(path.with_suffix(".lock"), wait=True):  # one process makes it, the others find it made
            if not _is_whole(path, shape):
                _write_store(path, shape, images(), verb=verb)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write_store(path: pathlib.Path, shape: tuple[int, ...], images: Iterable[np.ndarray], *, verb: str) -> None:
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"config.data.data_dir: {path} takes {needed / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB are free: "
            "choose another --config.data.data_dir or a smaller --config.data.resolution."
        )
    digest, rows = hashlib.sha256(), 0
    try:
        with (
            atomic_writer(path) as file,
            progress_bar(total=shape[0], description=f"{verb} {path.stem}") as progress,
        ):
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in images:
                data = np.ascontiguousarray(block).tobytes()
                digest.update(data)
                file.write(data)
                rows += len(block)
                progress.update(len(block))
            if rows != shape[0]:
                raise UserError(
                    f"{path} needs {shape[0]} images, but the dataset gave {rows}: prepare the dataset anew."
                )
        _write_record(path, shape, digest.hexdigest())
    except OSError as error:
        raise UserError(
            f"config.data.data_dir: {path} cannot be written ({error.strerror or error}): put that right, or choose "
            "another --config.data.data_dir."
        ) from error


def _write_record(path: pathlib.Path, shape: tuple[int, ...], sha256: str) -> None:
    status = path.stat()
    record = {"shape": list(shape), "sha256": sha256, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    write_json(path.with_suffix(".json"), record)


def _is_whole(path: pathlib.Path, shape: tuple[int, ...]) -> bool:
    """Whether a whole store of this shape is there.

    The bytes are read only where the file's size or time differ from the record, so a start does not cost a pass over
    them.

    Raises:
      UserError: it is there, but does not have the bytes that were written.
    """
    try:
        status = path.stat()
        record = json.loads(path.with_suffix(".json").read_text())
        if record["shape"] != list(shape):
            return False
        if (record["bytes"], record["modified_ns"]) == (status.st_size, status.st_mtime_ns):
            return True
        whole = record["bytes"] == status.st_size and _checksum(path) == record["sha256"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):  # of the record, which only a whole one vouches for
        whole = False
    if not whole:
        raise UserError(
            f"{path} is damaged: it does not have the bytes that were written; find out why (the disk, another "
            "program), then delete it, and it is made anew from the dataset."
        )
    _write_record(path, shape, record["sha256"])
    return True


def _checksum(path: pathlib.Path) -> str:
    """SHA-256 of the pixels, without the header."""
    pixels = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
    digest = hashlib.sha256()
    for start in range(0, pixels.size, HASH_BLOCK_BYTES):
        digest.update(pixels[start : start + HASH_BLOCK_BYTES].tobytes())
    return digest.hexdigest()
