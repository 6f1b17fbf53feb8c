"""What stopping, saving and several processes cost.

python -m benchmarks.hosts --json=benchmarks/results/hosts_cpu.json -- --config=configs/celeba128.py

Everything after `--` goes to the trainer, each time in a new workdir: SIGTERM at random moments until the process has
ended; the same steps with checkpoints and with none; one process and two on the same cores.
"""

import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks.environment import REPOSITORY, environment
from facevae_jax import command_line
from facevae_jax.errors import UserError
from facevae_jax.files import write_json

FIRST_STEP = "first step after"
STEPS_BETWEEN_SAVES = 3
RATE = re.compile(r"step +([\d,]+)/.* train .* ([\d,]+) images/s")


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_integer("signals", 6, "SIGTERMs to send", lower_bound=0)
    flags.DEFINE_integer("rounds", 3, "of each pair that is compared", lower_bound=0)
    flags.DEFINE_integer("steps", 40, "of a run that is one of a pair of processes", lower_bound=20)
    flags.DEFINE_integer(
        "saving_steps", 300, "of a run with and without checkpoints; 0: leaves that out", lower_bound=0
    )
    flags.DEFINE_string("json", None, "file to write")


def trainer(workdir: pathlib.Path, words: list[str], *, processes: int = 1) -> list[str]:
    """The command of a run."""
    command = [sys.executable, "-m", "facevae_jax.main", f"--workdir={workdir}", *words]
    launcher = [sys.executable, "launch/local.py", f"--processes={processes}", "--restarts=0", "--"]
    return command if processes == 1 else [*launcher, *command]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Starts a run whose lines are read here; huge pages are asked for once, as the run itself would."""
    settings = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=settings | dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command: list[str]) -> tuple[float, float]:
    """Runs to the end; (median images/s of the logged windows, seconds from the first step to the end)."""
    first = 0.0
    rates = []
    with start(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            first = time.perf_counter() if FIRST_STEP in line else first
            if found := RATE.search(line):
                rates.append(float(found.group(2).replace(",", "")))
        ended = time.perf_counter()
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {process.returncode}.")
    return statistics.median(rates), ended - first


def seconds_to_stop(words: list[str], after: float) -> float:
    """From a SIGTERM so many seconds after the first step to the end of the process, which has saved."""
    with tempfile.TemporaryDirectory() as folder, start(trainer(pathlib.Path(folder), words)) as process:
        assert process.stdout is not None
        assert any(FIRST_STEP in line for line in process.stdout)
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        sent = time.perf_counter()
        said = process.stdout.read()
        code = process.wait()
        seconds = time.perf_counter() - sent
    if code != 143 or "SIGTERM: saved" not in said:
        raise UserError(f"a run did not save on SIGTERM: exit code {code}: {said}")
    return seconds


def saving_cost(words: list[str], *, steps: int, rounds: int) -> dict[str, Any]:
    """The same steps with many checkpoints and with the last alone, in turns, to see what one costs."""
    schedule = [f"--config.train.steps={steps}", "--config.train.evaluate_every_epochs=1000"]
    cases: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, interval in (("without", 0), ("with", STEPS_BETWEEN_SAVES)):
            with tempfile.TemporaryDirectory() as folder:
                saves = f"--config.train.checkpoint_every_steps={interval}"
                cases[name].append(finish(trainer(pathlib.Path(folder), [*words, *schedule, saves]))[1])
    saves_more = (steps - 1) // STEPS_BETWEEN_SAVES
    each = (statistics.median(cases["with"]) - statistics.median(cases["without"])) / saves_more
    return {"seconds": cases, "saves": saves_more, "seconds_each": each, "share_at_one_a_minute": each / 60}


def processes_ratio(words: list[str], *, steps: int, rounds: int) -> dict[str, Any]:
    """Images/s of one process and of two on the same cores, in turns; the same global batch."""
    schedule = [f"--config.train.steps={steps}", "--config.train.log_every_steps=10"]
    rates: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(rounds):
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                rate, _ = finish(
                    trainer(
                        pathlib.Path(folder),
                        [*words, *schedule, "--config.train.evaluate_every_epochs=1000"],
                        processes=processes,
                    )
                )
                rates[str(processes)].append(rate)
                print(processes, rate, flush=True)
    ratios = [two / one for one, two in zip(rates["1"], rates["2"], strict=True)]
    return {"images_per_second": rates, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def main(arguments: list[str]) -> None:
    """Measures all three."""
    values = flags.FLAGS
    record: dict[str, Any] = {"what": __doc__, "trainer": arguments, "environment": environment()}
    draw = random.Random(0)
    if values.rounds:
        record["processes"] = processes_ratio(arguments, steps=values.steps, rounds=values.rounds)
        print(record["processes"])
    if values.signals:
        record["sigterm_seconds"] = [seconds_to_stop(arguments, draw.uniform(0, 60)) for _ in range(values.signals)]
        print(record["sigterm_seconds"])
    if values.saving_steps and values.rounds:
        record["saving"] = saving_cost(arguments, steps=values.saving_steps, rounds=values.rounds)
        print(record["saving"])
    if values.json:
        write_json(values.json, record)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
