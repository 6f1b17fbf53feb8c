"""Images that a program gives, kept as the pixel stores of a run.

The commands (`generate`, `report`, ...) find them there as the dataset `arrays`, so a run that was trained on arrays is
like any other. Without validation images of their own, a tenth is for that, by the number of the row.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.dataset import stored_at
from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.layouts.types import TRAIN, VALIDATION
from facevae_jax.data.store import open_store

AT_ONCE = 256  # images


def keep(
    images: Any, validation: Any = None, *, directory: pathlib.Path, resolution: int, replace: bool = False
) -> None:
    """Writes the splits of the dataset `arrays` under `directory`, if they are not there.

    Args:
      images: uint8 [N, R, R, 3], or a sequence (with `len` and an index) of images [R, R, 3], such as a PyTorch
        dataset; of an item that is a tuple or a list, the first part is the image.
      validation: the same, of the images that runs are evaluated on; None: a tenth of `images`.
      directory: of the dataset.
      resolution: R.
      replace: whether other images that are there are replaced.

    Raises:
      UserError: the images have another shape or type, there are none, there are others under `directory`, or there is
        no room.
    """
    for argument, value in {"images": images, "validation": validation}.items():
        if value is not None:
            _check(value, argument, resolution)
    rows = np.arange(len(images))
    if validation is None:
        splits = {split: (images, chosen) for split, chosen in hold_out(rows, "{:06d}".format).items()}
    else:
        splits = {TRAIN: (images, rows), VALIDATION: (validation, np.arange(len(validation)))}
    for split, (given, chosen) in splits.items():
        if len(chosen):
            _keep_split(given, chosen, stored_at(directory, split), resolution, replace=replace)


def _keep_split(
    images: Any, rows: Int[np.ndarray, " n"], path: pathlib.Path, resolution: int, *, replace: bool
) -> None:
    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, len(rows), AT_ONCE):
            yield _read(images, rows[first : first + AT_ONCE], resolution)

    record = path.with_suffix(".json")
    if record.exists():
        digest = hashlib.sha256()
        for block in blocks():
            digest.update(block.tobytes())
        if json.loads(record.read_bytes())["sha256"] == digest.hexdigest():
            return
        if not replace:
            raise UserError(
                f"images: the run was trained on others, which are in {path.parent}: give these, take a new workdir, "
                "or set accept_new_data=True."
            )
        record.unlink()
    open_store(path, (len(rows), resolution), blocks, verb="copying")


def _check(images: Any, argument: str, resolution: int) -> None:
    wanted = f"uint8 [N, {resolution}, {resolution}, {CHANNELS}], of the config's data.resolution"
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")) or isinstance(images, Mapping | str):
        raise UserError(f"{argument}: a {type(images).__name__} has no length and rows: give {wanted}.")
    if not len(images):
        raise UserError(f"{argument}: there are none: give {wanted}.")
    found = np.asarray(_image(images[0]))
    if (found.dtype, found.shape) != (np.uint8, (resolution, resolution, CHANNELS)):
        raise UserError(f"{argument}: the first is {found.dtype} {list(found.shape)}: give {wanted}.")


def _read(images: Any, rows: Int[np.ndarray, " n"], resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    if hasattr(images, "shape"):  # an array of NumPy, JAX, PyTorch, HDF5, ...
        return np.ascontiguousarray(images[rows])
    block = [np.asarray(_image(images[int(row)])) for row in rows]
    for row, image in zip(rows, block, strict=True):
        if (image.dtype, image.shape) != (np.uint8, (resolution, resolution, CHANNELS)):
            raise UserError(f"images: number {row} is {image.dtype} {list(image.shape)}, unlike the first: make it so.")
    return np.stack(block)


def _image(item: Any) -> Any:
    """The image of one item of a dataset, which may have a label too."""
    return item[0] if isinstance(item, tuple | list) else item
