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

from tests.conftest import CHEAP, REPOSITORY, change, flags_of, tiny

STARTING, STARTED = "devices:", "first step after"  # lines of a process
LATEST = {1: 1.5}  # seconds from such a line to the kill, by processes; the first checkpoint of several takes 2 s


def finish(words: list[str], kills: int, seconds: float, seed: int) -> int:
    """Runs a command to its end and kills a random one of its processes, at most `kills` times; returns how often.

    One kill of four comes as the processes start, the others after their first step; each up to `seconds` later.

    Raises:
      SystemExit: the run failed.
    """
    draw, killed = random.Random(seed), 0
    output: collections.deque[str] = collections.deque(maxlen=40)  # of the last attempts
    environment = os.environ | {"XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}
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


def main() -> None:
    """Trains with and without kills, and compares the checksums of every array of the last checkpoints.

    Raises:
      SystemExit: a run failed, or ended with different bits.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = options.kills * (150 if options.processes == 1 else 60)  # about as many as the kills allow
    launcher = ["launch/local.py", f"--processes={options.processes}", "--devices=1", "--restarts=1000", "--"]
    trainer = [sys.executable, "-m", "facevae_jax.main", "--heartbeat_seconds=10"]
    often = {"evaluate_every_epochs": 4, "checkpoint_every_steps": 16, "log_every_steps": 8, "steps_per_dispatch": 8}
    with tempfile.TemporaryDirectory() as folder:
        config = change(
            tiny(pathlib.Path(folder)), data={"synthetic_train_images": 512}, train=often | {"steps": steps}
        )
        words, found = [sys.executable, *launcher, *trainer, *flags_of(config)], []
        for name, kills in (("whole", 0), ("broken", options.kills)):
            workdir = pathlib.Path(folder, name)
            seconds = LATEST.get(options.processes, 5.0)
            killed = finish([*words, f"--workdir={workdir}"], kills, seconds, options.seed)
            record = workdir / "checkpoints" / str(steps) / "record" / "metadata"
            found.append(json.loads(record.read_text())["checksums"])
        if found[0] != found[1]:
            raise SystemExit(f"different bits after {killed} kills; seed {options.seed}")
        damaged = len(list(workdir.glob("damaged_checkpoints/*")))
    print(
        f"{killed} kills of {options.processes} process(es), {damaged} damaged checkpoints: same bits as without kills"
    )


if __name__ == "__main__":
    main()
