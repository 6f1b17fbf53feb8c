"""Grids of images as PNG files."""

import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax.files import atomic_writer

GAP = 2  # pixels between images
COMPRESS_LEVEL = 3  # of 9; training waits for its pictures, and 9 takes twice the time for a tenth of the size


def grid(images: UInt8[np.ndarray, "n h w c"], *, columns: int) -> UInt8[np.ndarray, "H W c"]:
    """Images in reading order, on white, with a small gap between them."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes one image, atomically."""
    with atomic_writer(path) as file:
        Image.fromarray(image).save(file, format="PNG", compress_level=COMPRESS_LEVEL)
