"""Grids of images as PNG files."""

import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax.core.files import atomic_writer

GAP = 2  # pixels between images
COMPRESS_LEVEL = 3  # training waits for its pictures, and level 9 takes twice the time to save a tenth of the size


def grid(images: UInt8[np.ndarray, "n h w c"], *, columns: int) -> UInt8[np.ndarray, "H W c"]:
    """The images row by row on a white background, `GAP` pixels apart."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def in_pairs(
    originals: UInt8[np.ndarray, "n h w c"], reconstructions: UInt8[np.ndarray, "n h w c"], *, columns: int = 8
) -> UInt8[np.ndarray, "rows columns h w c"]:
    """Rows of originals, each above its reconstructions; white fills up the last row."""
    columns = min(columns, len(originals))
    white = np.full((-len(originals) % columns, *originals.shape[1:]), 255, np.uint8)
    rows = [
        np.concatenate([images, white]).reshape(-1, columns, *images.shape[1:])
        for images in (originals, reconstructions)
    ]
    return np.stack(rows, axis=1).reshape(-1, columns, *originals.shape[1:])


def write_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes one image atomically."""
    with atomic_writer(path) as file:
        Image.fromarray(image).save(file, format="PNG", compress_level=COMPRESS_LEVEL)
