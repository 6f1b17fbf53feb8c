"""Memory and speed from thousands of images to millions, and what the plan of the rows costs.

python -m benchmarks.scale --images=10000,1000000 --json=benchmarks/results/scale_cpu.json

Draws that many faces at 32x32 into a .tar file, prepares it and trains on it, each by its own command.
"""

import io
import pathlib
import re
import tarfile
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks.environment import environment
from benchmarks.processes import Measured, run_measured
from facevae_jax import command_line
from facevae_jax.data import synthetic
from facevae_jax.data.images import encode_png
from facevae_jax.data.plan import BatchPlan
from facevae_jax.errors import UserError
from facevae_jax.files import write_json

RESOLUTION = 32
DRAWN_TOGETHER = 1000
PLANNED = (10**4, 10**6, 10**9)  # images whose rows are planned, and only planned
BATCH_SIZE, STEPS_TOGETHER = 150, 64
TRAINED_STEPS = 400


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_list("images", ["10000", "1000000"], "numbers of images, with commas between them")
    flags.DEFINE_string("json", None, "file to write")


def main(arguments: list[str]) -> None:
    """Measures every number of images, and the plan."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --images={arguments[0]}.")
    record: dict[str, Any] = {
        "what": f"faces drawn at {RESOLUTION}x{RESOLUTION} in a .tar file, prepared, then {TRAINED_STEPS} training "
        "steps; peak resident memory of each command in MB, all and without the pages of mapped files (anonymous)",
        "environment": environment(),
        "plan": {str(images): plan_cost(images) for images in PLANNED},
    }
    print(record["plan"])
    for images in map(int, flags.FLAGS.images):
        with tempfile.TemporaryDirectory() as folder:
            record[str(images)] = measure(images, pathlib.Path(folder))
        print(images, record[str(images)], flush=True)
        if flags.FLAGS.json:
            write_json(flags.FLAGS.json, record)


def plan_cost(images: int) -> dict[str, float]:
    """Microseconds of a step's rows on one core: alone, among many of an epoch, and the first of an epoch."""
    plan, repeats = BatchPlan(seed=0, images=images, batch_size=BATCH_SIZE), 50
    steps = images // BATCH_SIZE

    def microseconds(epoch: int, count: int, *, calls: int) -> float:
        starts = [epoch * steps + number % max(1, steps - count) for number in range(calls)]
        started = time.perf_counter()
        for start in starts:
            plan.rows(start, count)
        return (time.perf_counter() - started) / (calls * count) * 1e6

    first = [microseconds(epoch, 1, calls=1) for epoch in range(5)]
    count = min(STEPS_TOGETHER, steps)
    return {
        "batch_size": BATCH_SIZE,
        "first_of_epoch": float(np.median(first)),
        "alone": microseconds(4, 1, calls=repeats),
        f"of_{count}_together": microseconds(4, count, calls=repeats),
    }


def measure(images: int, folder: pathlib.Path) -> dict[str, Any]:
    """Draws, prepares and trains."""
    archive = folder / "faces.tar"
    started = time.perf_counter()
    with tarfile.open(archive, "w") as opened:
        for first in range(0, images, DRAWN_TOGETHER):
            rows = np.arange(first, min(first + DRAWN_TOGETHER, images))
            for row, pixels in zip(rows, synthetic.faces(rows, resolution=RESOLUTION), strict=True):
                data = encode_png(pixels)
                info = tarfile.TarInfo(f"{row:08d}.png")
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
            opened.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
    drawn = time.perf_counter() - started
    data = [f"--data_dir={folder}/data", f"--resolution={RESOLUTION}"]
    prepared = run_measured("facevae_jax.prepare", "--layout=folder", f"--source={archive}", "--name=scale", *data)
    settings = {"name": "scale", "resolution": RESOLUTION, "data_dir": f"{folder}/data"}
    overrides = [
        "--config=configs/ffhq128.py",
        f"--config.train.steps={TRAINED_STEPS}",
        "--config.train.evaluate_every_epochs=1000",
    ]
    overrides += [f"--config.data.{key}={value}" for key, value in settings.items()]
    # The first run decodes the pixel store.
    decoded = run_measured("facevae_jax.main", *overrides, "--config.train.steps=1", f"--workdir={folder}/first")
    trained = run_measured("facevae_jax.main", *overrides, f"--workdir={folder}/run")
    feed = re.search(r"feed: (\w+)", trained.output)
    speeds = [float(found.replace(",", "")) for found in re.findall(r"([\d,]+) images/s", trained.output)]
    return {
        "drawing_seconds": drawn,
        "prepare": figures(prepared) | {"images_per_second": images / prepared.seconds},
        "decode_store": figures(decoded),
        "train": figures(trained) | {"feed": feed[1] if feed else "", "images_per_second": float(np.median(speeds))},
    }


def figures(measured: Measured) -> dict[str, float]:
    """What is recorded of a command."""
    return {
        "seconds": measured.seconds,
        "peak_mbyte": measured.peak_bytes / 1e6,
        "peak_mbyte_anonymous": measured.peak_anonymous_bytes / 1e6,
    }


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
