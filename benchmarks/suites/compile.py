"""The time before the first step: tracing and compiling, and the whole start of the command."""

import dataclasses
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
from benchmarks.suites.timing import Options, medians
from benchmarks.suites.training import FixedBatch, on_drawn_faces
from facevae_jax.config import RunConfig

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
FIRST_STEP = re.compile(r"^first step after ([\d.]+) s", re.MULTILINE)
CONFIG_FILE = """\
from facevae_jax.config import RunConfig


def get_config():
    return RunConfig.from_config_dict({values!r}).to_config_dict()
"""


def run(options: Options) -> dict[str, Any]:
    """Compiles the train program in this process, and starts `facevae_jax.main` with an empty and a filled cache."""
    parts: dict[str, list[float]] = {"trace_and_lower": [], "compile": []}
    first_step: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder, images = pathlib.Path(name), options.config.train.batch_size
        config = on_drawn_faces(options.config, data_dir=name, train=images, validation=64, steps=2)
        (folder / "config.py").write_text(CONFIG_FILE.format(values=config.to_dict()))
        for number in range(options.rounds):
            for part, seconds in compile_seconds(options.config).items():
                parts[part].append(seconds)
            for temperature, values in first_step.items():
                workdir = folder / f"{temperature}-{number}"
                values.append(seconds_to_first_step(folder / "config.py", workdir, cache=folder / f"cache-{number}"))
    return {
        "what": "seconds to trace and lower and to compile the program of many training steps, and from the start of "
        "`python -m facevae_jax.main` to the end of its first step with an empty (cold) and a filled (warm) cache of "
        "compiled programs",
        "seconds": medians(parts),
        "seconds_to_first_step": medians(first_step),
        "seconds_all": parts,
        "seconds_to_first_step_all": first_step,
    }


def compile_seconds(config: RunConfig) -> dict[str, float]:
    """Seconds of tracing with lowering and of compiling the train program, without any cache."""
    # The seed is a constant of the program, so no cache on the disk has a program with a new one.
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


def seconds_to_first_step(config: pathlib.Path, workdir: pathlib.Path, *, cache: pathlib.Path) -> float:
    """Seconds that a new process reports for its first step.

    Raises:
      RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "facevae_jax.main", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    found = FIRST_STEP.search(result.stdout)
    if result.returncode or not found:
        raise RuntimeError(f"facevae_jax.main ended with exit code {result.returncode}: {result.stderr}")
    return float(found.group(1))
