"""Photographs of any size as the model's input: cropped like the training data, and resized."""

import functools
import itertools
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from facevae_jax.config import MAX_RESOLUTION
from facevae_jax.core.errors import UserError, expand_home
from facevae_jax.core.parallel import map_in_order
from facevae_jax.data.sources import images
from facevae_jax.data.sources.names import is_image
from facevae_jax.data.sources.opening import Folder, read_file


class Faces(NamedTuple):
    """Photographs and where they come from."""

    images: UInt8[np.ndarray, "n r r 3"]
    names: tuple[str, ...]  # of the files


def read_faces(*paths: str | os.PathLike[str], resolution: int) -> Faces:
    """Photographs as uint8 [n, R, R, 3], with their file names.

    The center square of an image is kept, as for FFHQ and folders in training; of an image of 178x218 pixels, the size
    of CelebA's aligned images, the 148x148 square that CelebA is trained on. A face that is off center, or much
    smaller or larger than in training, is reconstructed badly: crop it first, from hair to collar.

    `paths` are PNG, JPEG or WebP files, or folders of them.

    Raises UserError: a file cannot be read, or there is none.
    """
    if (
        isinstance(resolution, bool)
        or not isinstance(resolution, int | np.integer)
        or not 1 <= resolution <= MAX_RESOLUTION
    ):
        raise UserError(f"--resolution={resolution!r:.40}: choose a whole number from 1 to {MAX_RESOLUTION}.")
    files = list_photographs(paths)
    with warnings.catch_warnings():
        images.ignore_warnings()
        (faces,) = photograph_blocks(files, resolution=resolution, size=len(files))
    return Faces(faces, tuple(map(str, files)))


def list_photographs(paths: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """The files themselves, and the images in the folders among `paths`, sorted within each.

    Raises UserError: there is no such path, or no image.
    """
    files: list[pathlib.Path] = []
    for given in paths:
        path = expand_home(given, name="--images")
        if path.is_dir():
            folder = Folder(path)
            files += [folder.file(name) for name in folder.names() if is_image(name)]
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"--images: {path} does not exist: give PNG, JPEG or WebP files, or folders of them.")
    if not files:
        where = ", ".join(map(str, paths)) or "nothing given"
        raise UserError(f"--images: there is no PNG, JPEG or WebP file ({where}).")
    return files


def photograph_blocks(
    files: Sequence[pathlib.Path], *, resolution: int, size: int
) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
    """Photographs in blocks of `size`, in order, decoded by threads. Raises UserError: a file cannot be read."""
    read = functools.partial(read_photograph, resolution=resolution)
    read_in_order = map_in_order(read, files, threads=os.cpu_count() or 1)
    while block := list(itertools.islice(read_in_order, size)):
        yield np.stack(block)


def read_photograph(file: pathlib.Path | bytes, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """One photograph, a path or the bytes of a file, cropped and resized as `read_faces` says.

    Raises UserError: it is not an image, damaged, or has too many pixels or bytes.
    """
    try:
        data = file if isinstance(file, bytes) else read_file(file)
        with images.open_image(data) as image:
            size = images.upright_size(image)
            crop = images.CELEBA_CROP if size == images.CELEBA_SIZE else images.CENTER_SQUARE
        return np.asarray(images.load(data, images.Task(crop, resolution))[0])
    except Exception as error:  # decoders raise almost anything on damaged files
        name = "the photograph" if isinstance(file, bytes) else f"--images: {file}"
        raise UserError(f"{name} cannot be read: {images.why_unreadable(error)}.") from error
