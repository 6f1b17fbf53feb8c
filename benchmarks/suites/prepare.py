"""Preparation of a dataset beside the image decoder alone."""

import contextlib
import functools
import io
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from benchmarks.suites.options import Options
from facevae_jax.errors import UserError
from facevae_jax.prepare import available_cpus, open_layout, prepare

FIRST_PART = 4  # memory is compared between all images and one in so many
DECODED = 2000  # images at most that the decoder is timed on; its time grows with their number
SAMPLE_SECONDS = 0.02  # between two looks at the memory
SECONDS_OF_COUNTS = 5.0  # options.seconds for which a kind has its `count` of images
MIN_COUNT = 16


class Kind(NamedTuple):
    """Files that are made for the measurement."""

    suffix: str
    size: tuple[int, int]  # width and height in pixels
    count: int


KINDS = {
    "jpeg_178x218": Kind("jpg", (178, 218), 800),  # CelebA
    "png_128": Kind("png", (128, 128), 800),  # FFHQ's thumbnails
    "jpeg_1024": Kind("jpg", (1024, 1024), 80),
    "png_1024": Kind("png", (1024, 1024), 80),  # FFHQ
}


class Memory:
    """The peak resident memory of this process and its children while the block lasts; shared pages count in each."""

    def __enter__(self) -> "Memory":
        self._done = threading.Event()
        self.peak_bytes = resident_bytes()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process and all that it has started."""
    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def run(options: Options) -> dict[str, Any]:
    """`ratio_to_decoder`, images per second and peak memory, of `--source` or of every kind of made files."""
    resolution = options.config.data.resolution
    record: dict[str, Any] = {
        "what": "prepare in as many processes as there are cores, start of the processes included, over Pillow's "
        "decoding of the same files in one thread, divided by the cores; the marginal ratio is between all images and "
        "a quarter of them, without the start",
        "cores": available_cpus(),
        "resolution": resolution,
    }
    if options.source is not None:
        if options.layout not in ("ffhq", "celeba", "folder"):
            raise UserError(f"--layout={options.layout}: the decoder is timed on the files of ffhq, celeba or folder.")
        measured = measure(options.layout, options.source, None, resolution=resolution, rounds=options.rounds)
        return record | {"kinds": {options.layout: measured}}
    kinds = {}
    for name, kind in KINDS.items():
        count = max(MIN_COUNT, round(kind.count * options.seconds / SECONDS_OF_COUNTS))
        with tempfile.TemporaryDirectory(prefix="facevae-files-") as directory:
            whole, part = pathlib.Path(directory) / "whole", pathlib.Path(directory) / "part"
            make_files(whole, kind, count)
            make_part(whole, part)
            kinds[name] = measure("folder", str(whole), str(part), resolution=resolution, rounds=options.rounds)
    return record | {"kinds": kinds}


def make_files(directory: pathlib.Path, kind: Kind, count: int) -> None:
    """Smooth colours with some noise: like a photograph's, the files are neither tiny nor incompressible."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        pixels = np.asarray(coarse.resize(kind.size, Image.Resampling.BICUBIC), np.int16)
        noisy = pixels + generator.integers(-4, 5, pixels.shape, np.int16)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(directory / f"{number:05d}.{kind.suffix}", **({"quality": 90} if kind.suffix == "jpg" else {}))


def make_part(whole: pathlib.Path, part: pathlib.Path) -> None:
    """Every `FIRST_PART`-th file once more, as a hard link."""
    part.mkdir()
    for path in sorted(whole.iterdir())[::FIRST_PART]:
        os.link(path, part / path.name)


def measure(layout: str, source: str, part: str | None, *, resolution: int, rounds: int) -> dict[str, Any]:
    """The figures of one source; decoder and preparation take turns."""
    files = files_of(layout, source, resolution=resolution)
    sample = files[:: -(-len(files) // DECODED)]
    times: dict[str, list[float]] = {"decode": [], "prepare": [], "part": []}
    peaks: dict[str, list[int]] = {"prepare": [], "part": []}
    decode(sample)  # reads the files into the page cache
    for _ in range(rounds):
        times["decode"].append(timed(functools.partial(decode, sample)) * len(files) / len(sample))
        for name, folder in (("prepare", source), ("part", part)):
            if folder is not None:
                with tempfile.TemporaryDirectory(prefix="facevae-prepared-") as data_dir, Memory() as memory:
                    times[name].append(timed(functools.partial(prepare_quietly, layout, folder, resolution, data_dir)))
                peaks[name].append(memory.peak_bytes)
    return summarise(times, peaks, images=len(files), part_images=-(-len(files) // FIRST_PART))


def files_of(layout: str, source: str, *, resolution: int) -> list[pathlib.Path]:
    """The image files of all splits."""
    found = open_layout(layout, source, resolution=resolution)
    return [image.file for split in found.splits.values() for image in split if isinstance(image.file, pathlib.Path)]


def decode(files: Iterable[pathlib.Path]) -> None:
    """What no preparation can do without."""
    for path in files:
        with Image.open(path) as image:
            image.convert("RGB").load()


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def prepare_quietly(layout: str, source: str, resolution: int, data_dir: str) -> None:
    """What `python -m facevae_jax.prepare` does, without its lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(layout=layout, source=source, resolution=resolution, data_dir=data_dir, name="measured")


def summarise(
    times: dict[str, list[float]], peaks: dict[str, list[int]], *, images: int, part_images: int
) -> dict[str, Any]:
    """Medians, and all values."""
    cores = available_cpus()
    median = {name: statistics.median(values) for name, values in times.items() if values}
    record = {
        "images": images,
        "images_per_second": images / median["prepare"],
        "prepare_seconds": median["prepare"],
        "prepare_seconds_all": times["prepare"],
        "decode_seconds": median["decode"],
        "decode_seconds_all": times["decode"],
        "ratio_to_decoder": median["prepare"] / (median["decode"] / cores),
        "peak_mib": max(peaks["prepare"]) / 2**20,
    }
    if times["part"]:
        per_image = (median["prepare"] - median["part"]) / (images - part_images)
        record |= {
            "quarter_seconds": median["part"],
            "quarter_seconds_all": times["part"],
            "quarter_peak_mib": max(peaks["part"]) / 2**20,
            "marginal_ratio_to_decoder": per_image / (median["decode"] / images / cores),
        }
    return record
