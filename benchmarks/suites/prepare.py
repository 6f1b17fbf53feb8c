"""Preparing a dataset beside the decoder alone: what cropping, resizing, encoding and writing cost."""

import io
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.environment import REPOSITORY
from benchmarks.suites.timing import Options
from facevae_jax.core.parallel import available_cpus
from facevae_jax.data.drawn import synthetic
from facevae_jax.data.sources.images import FORMATS

DRAWN_FACES, DRAWN_RESOLUTION = 8, 256
NOISE = 2.0  # levels of 255, standard deviation: without it drawn faces compress far better than photographs


class Kind(NamedTuple):
    """Files that the suite writes."""

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
    """Times `python -m facevae_jax.prepare` and the decoder on each kind of file."""
    record: dict[str, Any] = {
        "what": "the whole command `python -m facevae_jax.prepare` beside Pillow decoding the same files to RGB on one "
        "core: ratio_to_decoder = seconds / (decoder's seconds / cores)",
        "resolution": options.config.data.resolution,
        "cores": available_cpus(),
    }
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            source = write_files(pathlib.Path(name, kind), KINDS[kind])
            record[kind] = measure(options, source, folder=pathlib.Path(name, f"{kind}.work"))
    return record


def measure(options: Options, source: pathlib.Path, *, folder: pathlib.Path) -> dict[str, Any]:
    """The figures of one folder of images; the command writes into `folder`."""
    files, decoder, runs = sorted(source.iterdir()), [], []
    for number in range(options.rounds):
        decoder.append(decode_seconds(files))
        runs.append(prepare(source, resolution=options.config.data.resolution, data_dir=folder / str(number)))
    decode, seconds = statistics.median(decoder), statistics.median(runs)
    return {
        "images": len(files),
        "ratio_to_decoder": seconds / (decode / available_cpus()),
        "images_per_second": len(files) / seconds,
        "decoder_images_per_second_of_one_core": len(files) / decode,
        "seconds": seconds,
        "seconds_all": runs,
        "decoder_seconds_all": decoder,
    }


def decode_seconds(files: Sequence[pathlib.Path]) -> float:
    """Seconds in which Pillow decodes the files to RGB, one after the other."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file, formats=FORMATS) as image:
            image.convert("RGB").load()
    return time.perf_counter() - started


def prepare(source: pathlib.Path, *, resolution: int, data_dir: pathlib.Path) -> float:
    """Runs the command as a user does and returns its seconds."""
    flags = {"layout": "folder", "source": source, "resolution": resolution, "data_dir": data_dir, "name": "benchmark"}
    words = [sys.executable, "-m", "facevae_jax.prepare", *(f"--{name}={value}" for name, value in flags.items())]
    started = time.perf_counter()
    subprocess.run(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def write_files(folder: pathlib.Path, kind: Kind) -> pathlib.Path:
    """Fills the new folder with drawn faces, with noise, as files of one kind and returns it."""
    folder.mkdir()
    generator, encoded = np.random.default_rng(0), []
    for face in synthetic.faces(np.arange(DRAWN_FACES), resolution=DRAWN_RESOLUTION):
        pixels = np.asarray(Image.fromarray(face).resize(kind.size, Image.Resampling.LANCZOS), np.float32)
        noisy = np.clip(np.round(pixels + NOISE * generator.standard_normal(pixels.shape)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, kind.format)
        encoded.append(buffer.getvalue())
    for number in range(kind.files):
        (folder / f"{number:05d}.{kind.format.lower()}").write_bytes(encoded[number % len(encoded)])
    return folder
