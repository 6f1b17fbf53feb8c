"""Photographs of any size as the model's images: cropped as its training data were, and resized."""

import io
import itertools
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from facevae_jax.data.images import FORMATS, Task, load, why_unreadable
from facevae_jax.data.layouts import CELEBA_CROP, CELEBA_SIZE, CENTRE_SQUARE
from facevae_jax.data.parallel import map_in_order
from facevae_jax.data.sources import Folder, image_rows, read_file
from facevae_jax.errors import UserError, expand_home
from facevae_jax.generation.trained import Faces

LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height
CHUNK = 16  # photographs that a thread decodes at a time


def read_faces(*paths: str | os.PathLike[str], resolution: int) -> Faces:
    """Photographs as uint8 [n, R, R, 3], with their file names.

    Of an image the centre square is kept, as of FFHQ and folders in training; of one of 178x218 pixels, the size of
    CelebA's aligned images, the square of 148 that CelebA is trained with. A face that is not in the middle, or much
    smaller or larger than there, will be reconstructed badly: crop it first, from hair to collar.

    Args:
      *paths: PNG, JPEG or WebP files, or folders of them.
      resolution: R, that of the model.

    Raises:
      UserError: a file cannot be read, or there is none.
    """
    files = list_photographs(paths)
    with warnings.catch_warnings():
        ignore_bomb_warnings()
        blocks = list(photograph_blocks(files, resolution=resolution, size=CHUNK))
    return Faces(np.concatenate(blocks), tuple(map(str, files)))


def ignore_bomb_warnings() -> None:
    """Keeps Pillow from warning of images with many pixels, which are refused here by an error anyway.

    Not where photographs are read, since that is done by threads, which share one list of filters.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def list_photographs(paths: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """The files themselves, and the images in the folders among `paths`, sorted within each.

    Raises:
      UserError: there is no such path, or no image.
    """
    files: list[pathlib.Path] = []
    for given in paths:
        path = expand_home(given, name="--images")
        if path.is_dir():
            listing = Folder(path).files()
            files += [listing.file(row) for row in image_rows(listing)]
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
    """Photographs in blocks of `size`, in order, decoded by threads.

    Raises:
      UserError: a file cannot be read.
    """
    chunks = [files[at : at + CHUNK] for at in range(0, len(files), CHUNK)]

    def read(chunk: Sequence[pathlib.Path]) -> list[np.ndarray]:
        return [read_photograph(file, resolution=resolution) for file in chunk]

    images = itertools.chain.from_iterable(map_in_order(read, chunks, threads=os.cpu_count() or 1))
    while block := list(itertools.islice(images, size)):
        yield np.stack(block)


def read_photograph(file: pathlib.Path | bytes, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """One photograph, cropped and resized as `read_faces` says.

    Args:
      file: its path, or its bytes.
      resolution: R.

    Raises:
      UserError: it is no image, damaged, or of too many pixels or bytes.
    """
    try:
        data = file if isinstance(file, bytes) else read_file(file)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) in LYING
            size = image.size[::-1] if lies else image.size
            crop = CELEBA_CROP if size == CELEBA_SIZE else CENTRE_SQUARE
        return np.asarray(load(data, Task(crop, resolution))[0])
    except Exception as error:  # decoders raise almost anything on damaged files
        name = "the photograph" if isinstance(file, bytes) else f"--images: {file}"
        raise UserError(f"{name} cannot be read: {why_unreadable(error)}.") from error
