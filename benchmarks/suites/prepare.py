"""Preparing a dataset beside the decoder alone: what cropping, resizing, encoding and writing cost, and the memory."""

import importlib.util
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.processes import Measured, run_measured
from benchmarks.suites.options import Options, Skipped
from facevae_jax.data import synthetic
from facevae_jax.data.images import FORMATS
from facevae_jax.data.parallel import available_cpus
from facevae_jax.errors import UserError
from facevae_jax.prepare import open_layout

NEEDED = ("tensorflow_datasets", "array_record")
DRAWN_FACES, DRAWN_RESOLUTION = 8, 256
NOISE = 2.0  # levels of 255, standard deviation: without it drawn faces compress far better than photographs
SMALLER = 4  # memory is compared with that of so many times fewer images


class Kind(NamedTuple):
    """Files that the suite writes itself."""

    format: str
    size: tuple[int, int]  # width and height in pixels
    files: int


KINDS = {
    "jpeg_178x218": Kind("JPEG", (178, 218), 4000),  # as CelebA's
    "png_128x128": Kind("PNG", (128, 128), 4000),  # as FFHQ's thumbnails
    "png_1024x1024": Kind("PNG", (1024, 1024), 200),  # as FFHQ's images
    "jpeg_1024x1024": Kind("JPEG", (1024, 1024), 1000),
}


def run(options: Options) -> dict[str, Any]:
    """Times `python -m facevae_jax.prepare` and the decoder on the given folder, or on each kind of file."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"needs the package {missing[0]}")
    record: dict[str, Any] = {
        "what": "the whole command `python -m facevae_jax.prepare` beside Pillow decoding the same files to RGB on one "
        "core: ratio_to_decoder = seconds / (decoder's seconds / cores); without_start takes the differences between "
        f"all images and a {SMALLER}th of them, so that imports drop out",
        "resolution": options.config.data.resolution,
        "cores": available_cpus(),
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.source is not None:
            sources = {options.layout: options.source}
        else:
            sources = {name: write_files(pathlib.Path(folder, name), kind) for name, kind in KINDS.items()}
        for name, source in sources.items():
            layout = options.layout if options.source is not None else "folder"
            record[name] = measure(options, source, layout=layout, folder=pathlib.Path(folder, f"{name}.work"))
    return record


def measure(options: Options, source: pathlib.Path, *, layout: str, folder: pathlib.Path) -> dict[str, Any]:
    """The figures of one source; `folder` is made for what is written."""
    resolution = options.config.data.resolution
    found = open_layout(layout, str(source), resolution=resolution)
    files = [image.file for images in found.splits.values() for image in images if isinstance(image.file, pathlib.Path)]
    if len(files) < 2 * SMALLER:
        raise UserError(f"--source={str(source)!r} has {len(files)} image files: give at least {2 * SMALLER}.")
    few = folder / "few"
    few.mkdir(parents=True)
    for number, file in enumerate(files[::SMALLER]):
        (few / f"{number:08d}{file.suffix}").symlink_to(file.resolve())
    few_files = sorted(few.iterdir())
    decoder: list[float] = []
    all_runs: list[Measured] = []
    few_runs: list[Measured] = []
    for number in range(options.rounds):
        decoder.append(decode_seconds(files))
        all_runs.append(command(source, layout=layout, resolution=resolution, data_dir=folder / f"all-{number}"))
        few_runs.append(command(few, layout="folder", resolution=resolution, data_dir=folder / f"few-{number}"))
    cores = available_cpus()
    decode = statistics.median(decoder)
    whole, part = (statistics.median(run.seconds for run in runs) for runs in (all_runs, few_runs))
    peaks = {len(files): all_runs, len(few_files): few_runs}
    return {
        "images": len(files),
        "ratio_to_decoder": whole / (decode / cores),
        "ratio_to_decoder_without_start": (whole - part) / (decode * (1 - len(few_files) / len(files)) / cores),
        "images_per_second": len(files) / whole,
        "decoder_images_per_second_of_one_core": len(files) / decode,
        "seconds": whole,
        "seconds_all": [run.seconds for run in all_runs],
        "decoder_seconds_all": decoder,
        "peak_mbyte_by_images": {
            str(images): statistics.median(run.peak_bytes for run in runs) / 1e6 for images, runs in peaks.items()
        },
    }


def decode_seconds(files: Sequence[pathlib.Path]) -> float:
    """Seconds in which Pillow decodes the files to RGB, one after the other."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file, formats=FORMATS) as image:
            image.convert("RGB").load()
    return time.perf_counter() - started


def command(source: pathlib.Path, *, layout: str, resolution: int, data_dir: pathlib.Path) -> Measured:
    """Runs the command as a user does.

    Raises:
      UserError: the command's own message, where it fails.
    """
    flags = {"layout": layout, "source": source, "resolution": resolution, "data_dir": data_dir, "name": "benchmark"}
    return run_measured("facevae_jax.prepare", *(f"--{name}={value}" for name, value in flags.items()))


def write_files(folder: pathlib.Path, kind: Kind) -> pathlib.Path:
    """Fills the new folder with files of one kind and returns it."""
    folder.mkdir()
    encoded = list(encode(kind))
    for number in range(kind.files):
        (folder / f"{number:05d}.{kind.format.lower()}").write_bytes(encoded[number % len(encoded)])
    return folder


def encode(kind: Kind) -> Iterator[bytes]:
    """Drawn faces with noise, as the bytes of files."""
    generator = np.random.default_rng(0)
    for face in synthetic.faces(np.arange(DRAWN_FACES), resolution=DRAWN_RESOLUTION):
        pixels = np.asarray(Image.fromarray(face).resize(kind.size, Image.Resampling.LANCZOS), np.float32)
        noisy = np.clip(np.round(pixels + NOISE * generator.standard_normal(pixels.shape)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, kind.format)
        yield buffer.getvalue()
