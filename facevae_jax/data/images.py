"""From an image file to the PNG bytes of a cropped, resized RGB image; many files at a time, in order."""

import collections
import concurrent.futures
import io
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from facevae_jax.data.records import Record, reason
from facevae_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")  # the only decoders that untrusted files reach
PNG_COMPRESS_LEVEL = 1  # 910 images/s at 128 pixels against 319 at level 6, for files 5% larger
WHITE = (255, 255, 255, 255)
CHUNK_BYTES = 2**22  # of decoded output per task: enough work to hide the hand-over, little enough to stay small
CHUNK_IMAGES = 32  # at most
CHUNKS_IN_FLIGHT = 3  # per worker


class Crop(NamedTuple):
    """The part of an image that is kept."""

    description: str
    size: tuple[int, int] | None = None  # (width, height) that every image must have; None: any
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels; None: the centre square


class Task(NamedTuple):
    """How every image of a dataset is converted."""

    crop: Crop
    resolution: int  # pixels along one side


class Converted(NamedTuple):
    """One image, or why there is none."""

    png: bytes
    enlarged: bool = False  # the crop was smaller than the resolution
    failure: str = ""


def convert(file: pathlib.Path | Record, task: Task) -> Converted:
    """Decodes, turns upright (EXIF), converts to RGB, crops, resizes (Lanczos, antialiased) and encodes one image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = io.BytesIO(file.read("image")) if isinstance(file, Record) else file
            with Image.open(source, formats=FORMATS) as image:
                cropped = crop_image(to_rgb(ImageOps.exif_transpose(image)), task.crop)
        size = (task.resolution, task.resolution)
        resized = cropped if cropped.size == size else cropped.resize(size, Image.Resampling.LANCZOS, reducing_gap=None)
        buffer = io.BytesIO()
        # Without this a colour profile or text of the source would travel into the dataset.
        resized.info.clear()
        resized.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
        return Converted(buffer.getvalue(), enlarged=cropped.width < task.resolution)
    except Exception as error:  # decoders raise almost anything on damaged files; the pass must reach the other files
        return Converted(b"", failure=reason(error))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency over white, 16-bit grey scaled by 1/257.

    Raises:
      ValueError: pixels that have no sensible 8-bit form (floating point, or integers above 65535).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if image.mode.startswith("I"):  # I;16, I;16B and the 32-bit I that holds 16-bit PNG values
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("integer pixels outside 0 to 65535 are not supported")
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def crop_image(image: Image.Image, crop: Crop) -> Image.Image:
    """The part of the image that `crop` keeps.

    Raises:
      ValueError: the image does not have the size that the crop needs.
    """
    if crop.size is not None and image.size != crop.size:
        raise ValueError(f"{image.width}x{image.height} pixels where {crop.size[0]}x{crop.size[1]} are expected")
    if crop.box is not None:
        return image.crop(crop.box)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def convert_all(
    files: Iterable[pathlib.Path | Record], task: Task, *, workers: int
) -> Generator[Converted, None, None]:
    """Converts `files` in `workers` processes and yields the results in the order of `files`.

    Few chunks are in flight at a time, so memory does not grow with the number of files.

    Raises:
      UserError: a worker process was killed.
    """
    if workers == 1:
        yield from (convert(file, task) for file in files)
        return
    images = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (3 * task.resolution**2)))
    # A fresh interpreter: the caller may have loaded JAX, whose threads do not survive a fork.
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        in_flight: collections.deque[concurrent.futures.Future[list[Converted]]] = collections.deque()
        for chunk in _chunks(files, images):
            in_flight.append(executor.submit(_convert_chunk, chunk, task))
            if len(in_flight) >= workers * CHUNKS_IN_FLIGHT:
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers={workers}: a worker process was killed, perhaps for want of memory: try --workers=1."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _chunks(files: Iterable[pathlib.Path | Record], size: int) -> Iterator[tuple[pathlib.Path | Record, ...]]:
    iterator = iter(files)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _convert_chunk(chunk: tuple[pathlib.Path | Record, ...], task: Task) -> list[Converted]:
    return [convert(file, task) for file in chunk]


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends the worker when the parent is killed: an orphan would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
