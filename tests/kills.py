"""Kills a training run at random moments, again and again, and compares what it arrives at.

    python -m tests.kills --kills=100                      # one process
    python -m tests.kills --kills=30 --processes=2         # one of two, with the launcher starting all again

Every time the same command goes on. At the end the parameters must have the bits of a run that nothing interrupted.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from tests.conftest import REPOSITORY

CONFIG = {
    "data.resolution": 32,
    "data.synthetic_train_images": 512,
    "data.synthetic_validation_images": 37,
    "model.latent_dim": 8,
    "model.filters": "(8,16)",
    "model.dropout_rate": 0.1,
    "train.batch_size": 16,
    "train.schedule": "constant",
    "train.evaluate_every_epochs": 4,
    "train.log_every_steps": 8,
    "train.checkpoint_every_steps": 16,
    "train.steps_per_dispatch": 8,
}
STARTED = "first step after"
TRAINING_SECONDS = 1.5  # from a first step to the latest kill
PAIR_TRAINING_SECONDS = 5.0  # of several processes, whose first checkpoint is not there before 2 s


def command(workdir: pathlib.Path, data_dir: pathlib.Path, *, steps: int, processes: int) -> list[str]:
    """The run, in one process or in several."""
    settings = {**CONFIG, "data.data_dir": data_dir, "train.steps": steps}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    words = [sys.executable, "-m", "facevae_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    if processes == 1:
        return words
    launcher = [sys.executable, "launch/local.py", f"--processes={processes}", "--devices=1", "--restarts=1000", "--"]
    return [*launcher, *words, "--heartbeat_seconds=10"]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Starts a command whose lines are read here."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def checksums(workdir: pathlib.Path, steps: int) -> dict[str, list[int]]:
    """Of every array of the last checkpoint."""
    return json.loads((workdir / "checkpoints" / str(steps) / "record" / "metadata").read_text())["checksums"]


def kill_one_process(words: list[str], kills: int, draw: random.Random, seconds_to_start: float) -> int:
    """Starts the run and kills it, so often; how many of the kills were after its first step."""
    in_training = 0
    for number in range(kills):
        with start(words) as process:
            assert process.stdout is not None
            delay = draw.uniform(0, seconds_to_start)
            if number % 4:  # one of four dies as it starts, which takes most of the time
                in_training += any(STARTED in line for line in process.stdout)
                delay = draw.uniform(0, TRAINING_SECONDS)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay)
            process.kill()
    return in_training


def kill_of_several(words: list[str], kills: int, draw: random.Random, seconds_to_start: float) -> int:
    """The launcher's run, of which a random process is killed at most so often; how often it was."""
    del seconds_to_start
    killed = 0
    said: collections.deque[str] = collections.deque(maxlen=40)  # of the last attempt or two
    with start(words) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            said.append(line)
            if STARTED in line and killed < kills:
                time.sleep(draw.uniform(0, PAIR_TRAINING_SECONDS))
                children = subprocess.run(
                    ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False
                )
                if numbers := children.stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(draw.choice(numbers)), signal.SIGKILL)
                        killed += 1
    if launcher.returncode:
        raise SystemExit(
            f"after {killed} kills the launcher ended with exit code {launcher.returncode}:\n{''.join(said)}"
        )
    return killed


def finish(words: list[str]) -> float:
    """Runs a command to its end; seconds until its first step.

    Raises:
      SystemExit: it failed.
    """
    started = first = time.monotonic()
    said = []
    with start(words) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            first = time.monotonic() if STARTED in line else first
    if process.returncode:
        raise SystemExit(f"a run that nothing interrupted failed:\n{''.join(said)}")
    return first - started


def run(kills: int, *, processes: int, steps: int, seed: int) -> str:
    """Kills and compares.

    Raises:
      SystemExit: a run failed, or arrived at other bits.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data_dir, whole, broken = (pathlib.Path(folder, name) for name in ("data", "whole", "broken"))
        seconds_to_start = finish(command(whole, data_dir, steps=steps, processes=processes))
        words = command(broken, data_dir, steps=steps, processes=processes)
        kill = kill_one_process if processes == 1 else kill_of_several
        in_training = kill(words, kills, draw, seconds_to_start)
        reached = max([int(path.name) for path in broken.glob("checkpoints/*") if path.name.isdigit()], default=0)
        finish(words)
        if checksums(whole, steps) != checksums(broken, steps):
            raise SystemExit(f"other bits after {kills} kills; seed {seed}")
        aside = len(list(broken.glob("damaged_checkpoints/*")))
        return (
            f"{kills} kills with {processes} process(es), {in_training} of them in training, which had come to step "
            f"{reached:,} of {steps:,}; {aside} checkpoints set aside; the bits are those of a run without kills"
        )


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of the run; 0: about as many as the kills let through")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = arguments.steps or arguments.kills * (150 if arguments.processes == 1 else 60)
    print(run(arguments.kills, processes=arguments.processes, steps=steps, seed=arguments.seed))


if __name__ == "__main__":
    main()
