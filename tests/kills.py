"""Kills a training run at random moments, after which launch/local.py restarts it, and compares its last checkpoint.

    python -m tests.kills --kills=100                 # one process
    python -m tests.kills --kills=30 --processes=2    # one of two processes

At the end the parameters must be bit-identical to those of an uninterrupted run.
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
    "train.steps_per_dispatch": 8,
}
STARTING, STARTED = "devices:", "first step after"  # lines of a process
LATEST = {1: 1.5}  # seconds from such a line to the kill, by processes; the first checkpoint of several takes 2 s


def command(workdir: pathlib.Path, data_dir: pathlib.Path, *, steps: int, processes: int) -> list[str]:
    """The command of the run, in processes that the launcher restarts."""
    settings = CONFIG | {"data.data_dir": data_dir, "train.steps": steps, "train.checkpoint_every_steps": 16}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    launcher = [sys.executable, "launch/local.py", f"--processes={processes}", "--devices=1", "--restarts=1000", "--"]
    words = [sys.executable, "-m", "facevae_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    return [*launcher, *words, "--heartbeat_seconds=10"]


def checksums(workdir: pathlib.Path, steps: int) -> dict[str, list[int]]:
    """The checksums of every array of the last checkpoint."""
    return json.loads((workdir / "checkpoints" / str(steps) / "record" / "metadata").read_text())["checksums"]


def finish(words: list[str], kills: int = 0, seconds: float = 0, seed: int = 0) -> int:
    """Runs a command to its end and kills a random one of its processes, at most `kills` times; returns how often.

    One kill of four comes as the processes start, the others after their first step; each up to `seconds` later.

    Raises:
      SystemExit: the run failed.
    """
    draw, killed = random.Random(seed), 0
    output: collections.deque[str] = collections.deque(maxlen=40)  # of the last attempts
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=both, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            output.append(line)
            if killed < kills and (STARTED if killed % 4 else STARTING) in line:
                time.sleep(draw.uniform(0, seconds))
                listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(int(draw.choice(listed.stdout.split())), signal.SIGKILL)
                    killed += 1
    if launcher.returncode:
        raise SystemExit(f"after {killed} kills: exit code {launcher.returncode}:\n{''.join(output)}")
    return killed


def run(kills: int, *, processes: int, steps: int, seed: int) -> str:
    """Kills, compares, and returns a summary.

    Raises:
      SystemExit: a run failed, or ended with different bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        data_dir, whole, broken = (pathlib.Path(folder, name) for name in ("data", "whole", "broken"))
        finish(command(whole, data_dir, steps=steps, processes=processes))
        words = command(broken, data_dir, steps=steps, processes=processes)
        killed = finish(words, kills, LATEST.get(processes, 5.0), seed)
        if checksums(whole, steps) != checksums(broken, steps):
            raise SystemExit(f"different bits after {killed} kills; seed {seed}")
        damaged = len(list(broken.glob("damaged_checkpoints/*")))
        return f"{killed} kills of {processes} process(es), {damaged} damaged checkpoints: same bits as without kills"


def main() -> None:
    """Parses the flags and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of the run; 0: about as many as the kills allow")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = arguments.steps or arguments.kills * (150 if arguments.processes == 1 else 60)
    print(run(arguments.kills, processes=arguments.processes, steps=steps, seed=arguments.seed))


if __name__ == "__main__":
    main()
