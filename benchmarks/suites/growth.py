"""How the speed of the step changes with the batch, the resolution and the latent size."""

import statistics
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.suites.options import Options
from benchmarks.suites.timing import Case, rates
from benchmarks.suites.training import FixedBatch, with_size
from facevae_jax.config import RunConfig
from facevae_jax.data.batches import free_device_memory

BATCH_SIZES = (1, 4, 16, 64, 150, 256, 1024)
RESOLUTIONS = (32, 64, 128, 256, 512)
LATENT_DIMS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PIXELS_IN_BATCH = 150 * 128**2  # at most, so that the work of a step stays about the same at every resolution
STEP_SECONDS = 60.0  # a series ends where one step takes longer


def run(options: Options) -> dict[str, Any]:
    """Times one series of configs for each of the three sizes."""
    config = options.config
    plain = {
        "resolution": config.data.resolution,
        "batch_size": config.train.batch_size,
        "latent_dim": config.model.latent_dim,
    }
    series: dict[str, dict[int, dict[str, int]]] = {
        "batch_size": {x: plain | {"batch_size": x} for x in BATCH_SIZES},
        "resolution": {x: plain | {"resolution": x, "batch_size": batch_at(x)} for x in RESOLUTIONS},
        "latent_dim": {x: plain | {"latent_dim": x} for x in LATENT_DIMS},
    }
    record: dict[str, Any] = {
        "what": "training steps on one fixed batch in device memory as one size changes and the others stay, but for "
        f"the batch beside the resolution: it has at most {PIXELS_IN_BATCH} pixels",
    }
    left_out = {}
    for name, sizes in series.items():
        record[name], left_out[name] = measure(options, sizes)
    return {**record, "left_out": left_out}


def batch_at(resolution: int) -> int:
    """Images in the batch at a resolution: a multiple of the devices."""
    devices = jax.device_count()
    return max(1, PIXELS_IN_BATCH // resolution**2 // devices) * devices


def measure(options: Options, sizes: Mapping[int, dict[str, int]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The points of one series, and why others are missing."""
    cases, left_out = start(options.config, sizes)
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    points = [
        {
            "x": int(x),
            "batch_size": sizes[int(x)]["batch_size"],
            "images_per_second": statistics.median(repeated),
            "images_per_second_all": repeated,
        }
        for x, repeated in values.items()
    ]
    return points, left_out


def start(config: RunConfig, sizes: Mapping[int, dict[str, int]]) -> tuple[dict[str, Case], dict[str, str]]:
    """The cases of one series, up to the first that is too much for this machine, and why others are missing."""
    cases: dict[str, Case] = {}
    left_out: dict[str, str] = {}
    for x, size in sizes.items():
        if size["batch_size"] % jax.device_count():
            left_out[str(x)] = f"not divisible by {jax.device_count()} devices"
            continue
        try:
            sized = with_size(config, **size)
        except ValueError as error:  # too many stages for a small resolution
            left_out[str(x)] = str(error)
            continue
        program = FixedBatch(sized)
        needed, free = program.bytes_needed, free_device_memory()
        if needed > free:
            left_out[f"from {x}"] = f"needs {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that a device has free"
            break
        case = program.start()
        if (seconds := case.run(1)) > STEP_SECONDS:
            left_out[f"from {x}"] = f"one step takes {seconds:.0f} s"
            break
        cases[str(x)] = case
    return cases, left_out
