"""One command for a machine that is lent for minutes: steps, plans, whole runs and peers, most important first.

python -m benchmarks.accelerator --topology=1xh100 --json=benchmarks/results/accelerator_h100.json

Each part is a process of its own with what is left of --minutes, and the file is written after each: what failed, or
did not end in time, is named there. Plans need `facevae-jax[plan-gpu]` beside the GPU's packages, and peers PyTorch.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks.environment import REPOSITORY
from facevae_jax.core import command_line
from facevae_jax.core.errors import UserError, expand_home, make_writable_directory
from facevae_jax.core.files import write_json

# The paper's network, the two that train on laptops and the one whose batch suits accelerators.
CONFIGS = ("gdl128", "celeba64", "celeba64_spatial", "ffhq128")

_CONFIGS = flags.DEFINE_list("configs", list(CONFIGS), "What to train.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "This machine in the words of facevae_jax.plan; without it no plans.")
_SETTINGS = flags.DEFINE_list("settings", [], "Settings of all configs, such as train.batch_size=256.")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "After which nothing runs any more.", lower_bound=0.0)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each case.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "One timing, about.", lower_bound=1e-3)
_OUTPUT = flags.DEFINE_string("json", None, "File to write.")


def main(arguments: list[str]) -> None:
    """Runs the parts one after the other."""
    if arguments or not _OUTPUT.value:
        raise UserError("give --json=FILE, and other settings as --name=value.")
    path = expand_home(_OUTPUT.value, name="--json")
    make_writable_directory(path.parent, name="--json's directory")
    deadline = time.monotonic() + 60 * _MINUTES.value
    record: dict[str, Any] = {"parts": {}, "missing": {}, **environment_in_a_process()}
    for name, command in commands().items():
        started = time.monotonic()
        try:
            record["parts"][name] = output_of(command, seconds=deadline - started)
        except UserError as error:
            record["missing"][name] = str(error)
        print(f"{name}: {time.monotonic() - started:.0f} s {record['missing'].get(name, '')}", flush=True)
        record["errors_of_the_plans"] = errors_of_the_plans(record["parts"])
        write_json(path, record)


def commands() -> dict[str, list[str]]:
    """What is run, by the part's name, in the order of importance."""
    settings = [f"--config.{each}" for each in _SETTINGS.value]
    timing = [f"--rounds={_ROUNDS.value}", f"--seconds={_SECONDS.value}"]
    found: dict[str, list[str]] = {}

    def suite(name: str, config: str) -> list[str]:
        return ["benchmarks.throughput", f"--suite={name}", f"--config=configs/{config}.py", *settings, *timing]

    for config in _CONFIGS.value:
        found[f"step {config}"] = suite("step", config)
        if _TOPOLOGY.value:
            plan = ["facevae_jax.plan", f"--config={config}", f"--topology={_TOPOLOGY.value}"]
            found[f"plan {config}"] = [*plan, "--images=60000", "--json", *settings]
    for config in _CONFIGS.value[:2]:
        found[f"end_to_end {config}"] = suite("end_to_end", config)
    found["peers"] = suite("peers", _CONFIGS.value[0])
    return found


def output_of(command: list[str], *, seconds: float) -> Any:
    """The JSON of a command's standard output (a plan) or of its file (a suite).

    Raises:
      UserError: it failed, or did not end in time.
    """
    is_suite = command[0] == "benchmarks.throughput"
    plans = {} if is_suite else {"JAX_PLATFORMS": "cpu"}  # a plan needs no device, and must not take its memory
    with tempfile.TemporaryDirectory() as folder:
        file, log = pathlib.Path(folder, "record.json"), pathlib.Path(folder, "log")
        words = [sys.executable, "-m", *command, *([f"--json={file}"] if is_suite else [])]
        with log.open("w") as errors:
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env=os.environ | plans,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            try:
                printed, _ = process.communicate(timeout=max(0.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
                process.communicate()
                raise UserError(f"it did not end in {max(0.0, seconds):.0f} s.") from None
        if process.returncode:
            raise UserError(f"exit code {process.returncode}: {(log.read_text().splitlines() or ['no message'])[-1]}")
        if not is_suite:
            return json.loads(printed)[0]
        ((_, found),) = json.loads(file.read_text())["suites"].items()
        return found


def environment_in_a_process() -> dict[str, Any]:
    """`environment()`, of a process that ends: this one would keep the device's memory."""
    code = "import json; from benchmarks.environment import environment; print(json.dumps(environment()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def errors_of_the_plans(parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By config: the planned step as a share of the measured one, and the planned temporaries of the compiled ones."""
    found: dict[str, dict[str, float]] = {}
    for config in _CONFIGS.value:
        step, plan = parts.get(f"step {config}"), parts.get(f"plan {config}")
        if step and plan:
            milliseconds = 1e3 * plan["estimated_step_seconds"]
            found[config] = {"planned_to_measured_step": milliseconds / step["milliseconds_per_step"]}
            planned, compiled = plan["temporary_bytes"], step["temporary_bytes"]
            found[config]["planned_to_compiled_temporaries"] = planned / max(1, compiled)
    return found


if __name__ == "__main__":
    command_line.run(main)
