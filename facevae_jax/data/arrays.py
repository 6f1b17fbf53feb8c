"""Images that a program gives, kept as the pixel stores of a run.

The commands (`generate`, `report`, ...) find them there as the dataset `arrays`, so a run that was trained on arrays is
like any other. Without validation images of their own, a tenth is for that, by the number of the row.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.dataset import stored_at
from facevae_jax.data.layouts.splits import hold_out
from facevae_jax.data.layouts.types import SPLITS, TRAIN, VALIDATION
from facevae_jax.data.store import open_store

AT_ONCE = 256  # images


class Part(NamedTuple):
    """The images of one split."""

    argument: str  # that gave them
    images: Any
    rows: Int[np.ndarray, " n"]


class GivenImages:
    """The splits of images that a program gives; nothing is read but the first of each argument."""

    def __init__(self, images: Any, validation_images: Any = None, *, resolution: int) -> None:
        """Takes the images.

        Args:
          images: uint8 [N, R, R, 3], or a sequence (with `len` and an index) of images [R, R, 3], such as a PyTorch
            dataset; of an item that is a tuple or a list, the first part is the image. An index must always give the
            same image.
          validation_images: the same, of those that runs are evaluated on; None: a tenth of `images`.
          resolution: R.

        Raises:
          UserError: the first image has another shape or type, or there are none.
        """
        self._resolution = resolution
        _check_sequence(images, "images")
        rows = np.arange(len(images))
        if validation_images is None:
            of_splits = hold_out(rows, "{:06d}".format)
            self._parts = {split: Part("images", images, chosen) for split, chosen in of_splits.items() if len(chosen)}
        else:
            _check_sequence(validation_images, "validation_images")
            of_validation = np.arange(len(validation_images))
            self._parts = {
                TRAIN: Part("images", images, rows),
                VALIDATION: Part("validation_images", validation_images, of_validation),
            }
        for part in self._parts.values():
            self._read(part, part.rows[:1])

    @property
    def training_images(self) -> int:
        """How many there are to train on."""
        return len(self._parts[TRAIN].rows)

    def keep(self, directory: pathlib.Path, *, replace: bool) -> None:
        """Writes the dataset `arrays` under `directory`, if it is not there; `replace`: in place of another.

        Raises:
          UserError: there are other images, one has another shape or type, or there is no room.
        """
        kept = {split: _sha256(stored_at(directory, split)) for split in SPLITS}
        given = {split: self._digest(part) if kept[split] else "" for split, part in self._parts.items()}
        for split, part in self._parts.items():
            if not replace and kept[split] != given[split]:
                raise UserError(
                    f"{part.argument}: the run was trained on others, which are in {directory}: give the same (an "
                    "index must give the same image whenever it is asked), take a new workdir, or set "
                    "accept_new_data=True."
                )
        for split in SPLITS:
            path = stored_at(directory, split)
            whole = kept[split] and kept[split] == given.get(split) and path.exists()
            if not whole:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        for split, part in self._parts.items():
            size, blocks = (len(part.rows), self._resolution), functools.partial(self._blocks, part)
            try:
                open_store(stored_at(directory, split), size, blocks, verb="copying")
            except UserError as error:
                raise UserError(str(error).replace("config.data.data_dir", "workdir")) from error

    def _digest(self, part: Part) -> str:
        digest = hashlib.sha256()
        for block in self._blocks(part):
            digest.update(block.tobytes())
        return digest.hexdigest()

    def _blocks(self, part: Part) -> Iterator[UInt8[np.ndarray, "n r r 3"]]:
        for first in range(0, len(part.rows), AT_ONCE):
            yield self._read(part, part.rows[first : first + AT_ONCE])

    def _read(self, part: Part, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n r r 3"]:
        """Some rows, checked."""
        shape = (self._resolution, self._resolution, CHANNELS)
        is_array = len(getattr(part.images, "shape", ())) == 1 + len(shape)  # of NumPy, JAX, PyTorch, HDF5, ...
        found = part.images[rows] if is_array else [_image(part.images[int(row)]) for row in rows]
        images = [np.asarray(image) for image in found]
        for row, image in zip(rows, images, strict=True):
            if (image.dtype, image.shape) != (np.uint8, shape):
                raise UserError(
                    f"{part.argument}: number {row} is {image.dtype} {list(image.shape)}: give uint8 "
                    f"[N, {', '.join(map(str, shape))}], of the config's data.resolution."
                )
        return np.stack(images)


def _check_sequence(images: Any, argument: str) -> None:
    wanted = "give an array [N, R, R, 3], or what has a length and gives an image for an index"
    try:
        count = len(images)
    except TypeError:
        raise UserError(f"{argument}: a {type(images).__name__} has no length: {wanted}.") from None
    if not hasattr(images, "__getitem__") or isinstance(images, Mapping | str):
        raise UserError(f"{argument}: a {type(images).__name__} has no rows: {wanted}.")
    if not count:
        raise UserError(f"{argument}: there are none: {wanted}.")


def _image(item: Any) -> Any:
    """The image of one item of a dataset, which may have a label too."""
    return item[0] if isinstance(item, tuple | list) else item


def _sha256(path: pathlib.Path) -> str:
    """Of the store at `path`, as it was written; empty where there is none that can be told."""
    try:
        return str(json.loads(path.with_suffix(".json").read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
