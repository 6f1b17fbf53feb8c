"""What comes before the first step: tracing and compiling, and the whole start of the command."""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import secrets
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from jax import monitoring

from benchmarks.environment import REPOSITORY
from benchmarks.suites.options import Options
from benchmarks.suites.timing import median_or_none, medians
from benchmarks.suites.training import FixedBatch
from facevae_jax.config import RunConfig
from facevae_jax.data.pixels import open_splits
from facevae_jax.files import write_json

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
STEPS = 2
VALIDATION_IMAGES = 64
FIRST_STEP = re.compile(r"^first step after ([\d.]+) s", re.MULTILINE)
TIME_LIMIT_SECONDS = 1800.0
CONFIG_FILE = """\
import json
import pathlib

from facevae_jax.config import RunConfig


def get_config():
    values = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
    return RunConfig.from_config_dict(values).to_config_dict()
"""


def run(options: Options) -> dict[str, Any]:
    """Compiles the train program in this process, and starts `facevae_jax.main` with an empty and a filled cache."""
    parts: dict[str, list[float]] = {"trace_and_lower": [], "compile": []}
    first_step: dict[str, list[float | None]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(options, data_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):
            open_splits(config.data)  # draws the faces: else the first start would
        path = pathlib.Path(folder, "config.py")
        path.write_text(CONFIG_FILE)
        write_json(path.with_suffix(".json"), config.to_dict())
        for number in range(options.rounds):
            for name, seconds in compile_seconds(options.config).items():
                parts[name].append(seconds)
            for temperature, seconds_to_first in first_step.items():
                workdir, cache = (
                    pathlib.Path(folder, f"{temperature}-{number}"),
                    pathlib.Path(folder, f"cache-{number}"),
                )
                seconds_to_first.append(start_command(path, workdir=workdir, cache=cache))
    return {
        "what": "seconds to trace and lower and to compile the program of many training steps, and from the start of "
        "`python -m facevae_jax.main` to the end of its first step with an empty (cold) and a filled (warm) cache of "
        "compiled programs",
        "seconds": medians(parts),
        "seconds_to_first_step": {name: median_or_none(values) for name, values in first_step.items()},
        "seconds_all": parts,
        "seconds_to_first_step_all": first_step,
    }


def compile_seconds(config: RunConfig) -> dict[str, float]:
    """Seconds of both parts of compiling the train program, with no help from any cache."""
    # The seed is a constant of the program: with a new one no cache on the disk has it.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=secrets.randbelow(2**32)))
    jax.clear_caches()
    compiled = [0.0]

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == COMPILE_EVENT:
            compiled[0] += duration_secs

    monitoring.register_event_duration_secs_listener(listen)
    try:
        started = time.perf_counter()
        FixedBatch(config)
        seconds = time.perf_counter() - started
    finally:
        monitoring.unregister_event_duration_listener(listen)
    return {"trace_and_lower": seconds - compiled[0], "compile": compiled[0]}


def run_config(options: Options, *, data_dir: str) -> RunConfig:
    """The config for a few steps on a few drawn faces."""
    config = options.config
    data = dataclasses.replace(
        config.data,
        name="synthetic",
        data_dir=data_dir,
        synthetic_train_images=config.train.batch_size,
        synthetic_validation_images=VALIDATION_IMAGES,
    )
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, steps=STEPS))


def start_command(config: pathlib.Path, *, workdir: pathlib.Path, cache: pathlib.Path) -> float | None:
    """Seconds to the first step that a fresh command says it took; None if it does not say."""
    result = subprocess.run(
        [sys.executable, "-m", "facevae_jax.main", f"--config={config}", f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_SECONDS,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"facevae_jax.main ended with status {result.returncode}: {result.stderr}")
    found = FIRST_STEP.search(result.stdout)
    return float(found.group(1)) if found else None
