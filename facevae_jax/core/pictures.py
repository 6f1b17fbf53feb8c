"""Grids of images as PNG files."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from facevae_jax.core.files import atomic_writer

GAP = 2  # pixels between images
TEXT_SIZE = 12  # pixels
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


def enlarged(images: UInt8[np.ndarray, "*n h w c"], scale: int) -> UInt8[np.ndarray, "*n H W c"]:
    """Each pixel as a square of `scale` by `scale`."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def with_labels(
    canvas: UInt8[np.ndarray, "h w 3"], *, rows: Sequence[str], columns: Sequence[str], cell: int
) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of square images with a text before each row and above each column.

    Args:
      canvas: of `grid`.
      rows: texts; none: no margin.
      columns: texts; one that is wider than its column is cut off.
      cell: pixels along one side of an image.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else TEXT_SIZE
    left = max((round(font.getlength(text)) for text in rows), default=-2 * GAP) + 2 * GAP
    top = height + GAP if columns else 0
    page = Image.new("RGB", (canvas.shape[1] + left, canvas.shape[0] + top), "white")
    page.paste(Image.fromarray(canvas), (left, top))
    draw = ImageDraw.Draw(page)
    for number, text in enumerate(rows):
        draw.text((GAP, top + number * (cell + GAP) + (cell - height) // 2), text, "black", font)
    for number, text in enumerate(columns):
        shown = next(text[:size] for size in range(len(text), -1, -1) if font.getlength(text[:size]) <= cell)
        middle = left + number * (cell + GAP) + (cell - round(font.getlength(shown))) // 2
        draw.text((middle, 0), shown, "black", font)
    return np.asarray(page)


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
