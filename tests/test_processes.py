"""Several processes as one run, on one machine, started by launch/local.py."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest

from facevae_jax.training.loop import train
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import CHEAP, REPOSITORY, assert_one_line_error, change, flags_of, losses_of

pytestmark = pytest.mark.slow
SECONDS = 600  # ends a hang
STEPS = 20
README = (REPOSITORY / "README.md").read_text()
LAUNCH = (sys.executable, "launch/local.py")


def command(config, workdir, **train_settings):
    """The command of one process."""
    return [sys.executable, "-m", "facevae_jax.main", *flags_of(config, train=train_settings), f"--workdir={workdir}"]


def launcher(*, processes, devices=1, restarts=3):  # on a busy machine processes may connect too late for Gloo
    return [*LAUNCH, f"--processes={processes}", f"--devices={devices}", f"--restarts={restarts}", "--"]


def launch(words, **how):
    environment = os.environ | {"XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": SECONDS}
    return subprocess.run([*(launcher(**how) if how else ()), *words], **options, check=False)


@contextlib.contextmanager
def training(words, **how):
    """Two processes that have trained 8 steps: yields their launcher and its processes' ids, in order."""
    environment, pipe = os.environ | {"XLA_FLAGS": CHEAP}, subprocess.PIPE
    command = [*launcher(processes=2, **how), *words]
    both = {"stdout": pipe, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, **both) as process:
        output = lines_until(process, r"step +8/")
        assert process.poll() is None, output
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        yield process, [int(number) for number in children.stdout.split()]


def lines_until(process, pattern):
    return list(itertools.takewhile(lambda line: not re.search(pattern, line), process.stdout))


def assert_same_losses(workdir, other, *, besides=()):
    """`besides` is what only the first has."""
    mine, theirs = [entry for entry in losses_of(workdir) if entry[:2] not in besides], losses_of(other)
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in theirs]
    np.testing.assert_allclose([e[2] for e in mine], [e[2] for e in theirs], rtol=1e-5)


def record(workdir, step):
    """The checksums of all arrays of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())


@pytest.fixture(scope="module")
def warm_config(tiny_config):
    """The tiny run with a warm-up, so that Adam does not amplify rounding differences beyond 1e-5."""
    return change(tiny_config, train={"warmup_steps": 20, "learning_rate": 2e-3})


@pytest.fixture(scope="module")
def alone(warm_config, tmp_path_factory):
    """The run in this process, on 8 devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train(warm_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def pair(warm_config, tmp_path_factory):
    """The run in two processes without an interruption, by README's command with small settings."""
    workdir = tmp_path_factory.mktemp("pair")
    line = next(line for line in README.splitlines() if line.startswith("python launch/local.py"))
    typed = [sys.executable if word == "python" else word for word in shlex.split(line)]
    result = launch([*typed, *command(warm_config, workdir)[4:]])
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_two_processes_are_one_run(pair, alone):
    workdir, result = pair
    assert "devices: 2 x cpu in 2 processes" in result.stdout
    assert_same_losses(workdir, alone)
    speakers = {line.split("]")[0] for line in result.stdout.splitlines() if "Gloo" not in line}
    assert speakers == {"[0"}
    steps = [r["step"] for r in read_metrics(workdir) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # each once


@pytest.mark.parametrize("feed", ["sharded", "streamed"])
def test_each_process_brings_its_own_rows(alone, warm_config, tmp_path, feed):
    words = [*command(warm_config, tmp_path), f"--config.data.feed={feed}"]
    assert launch(words, processes=2, devices=2).returncode == 0
    assert_same_losses(tmp_path, alone)


def test_a_run_resumes_on_other_topologies(alone, warm_config, tmp_path):
    """Each trains on from where the one before has saved; the first of all is this process, stopped after 7 steps."""
    train(warm_config, tmp_path, should_stop=lambda step: step == 7)
    step, ends = 7, {"2x4": 9, "1x1": 12, "4x2": 14, "1x8": 16, "2x1": 18, "1x2": STEPS}  # processes x devices
    for topology, end in ends.items():
        how = {"processes": int(topology[0]), "devices": int(topology[2])}
        result = launch(command(warm_config, tmp_path, steps=end), **how)
        assert result.returncode == 0, result.stderr
        assert f"resuming from step {step}" in result.stdout or "nothing is left" in result.stdout
        step = end
    assert_same_losses(tmp_path, alone, besides=[("evaluation", end) for end in ends.values() if end < STEPS])


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_the_launcher_restarts_all_to_the_same_bits(pair, warm_config, tmp_path, victim):
    words = [*command(warm_config, tmp_path, checkpoint_every_steps=3), "--heartbeat_seconds=10"]
    with training(words) as (process, members):
        os.kill(members[victim], signal.SIGKILL)
        output = process.stdout.read()
        assert process.wait(timeout=SECONDS) == 0, output
    assert f"process {victim} of 2 was ended by SIGKILL" in output
    assert "Traceback" not in output or victim == 0  # without its coordinator a process is ended by JAX itself
    assert re.search(r"resuming from step \d", output)
    assert record(tmp_path, STEPS) == record(pair[0], STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_and_saves_all(warm_config, tmp_path, number):
    words = command(warm_config, tmp_path, epochs=100)
    with training(words) as (process, members):
        os.kill(members[1], number)
        rest = process.stdout.read()
        assert process.wait(timeout=SECONDS) == 128 + number
    assert f"{number.name}: saved" in rest
    assert "restarting" not in rest
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert 8 <= max(saved) < 1000
    assert max(r["step"] for r in read_metrics(tmp_path)) == max(saved)


def test_a_stuck_process_ends_the_run(warm_config, tmp_path):
    words = [*command(warm_config, tmp_path, epochs=100, watchdog_seconds=20), "--heartbeat_seconds=300"]
    with training(words, restarts=0) as (process, members):
        os.kill(members[1], signal.SIGSTOP)
        waited = lines_until(process, "process 0 of 2 ended with exit code 1")
        os.kill(members[1], signal.SIGKILL)
        process.stdout.read()
        assert process.wait(timeout=SECONDS) == 1
    assert any("training/loop.py" in line for line in waited), waited  # where it waited


def test_a_mistake_in_one_process_is_reported_once(warm_config, tmp_path):
    (tmp_path / "file").touch()
    result = launch(command(warm_config, tmp_path / "file" / "run"), processes=2)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("[") and "Gloo" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("[0] error: --workdir=")


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [
        (["--processes=2"], "--coordinator="),
        (["--coordinator=here", "--processes=2", "--process_id=0"], "--coordinator='here'"),
        (["--coordinator=a:1", "--processes=2", "--process_id=2"], "--process_id=2"),
    ],
)
def test_an_incomplete_cluster_is_one_line(warm_config, tmp_path, flags, mentioned):
    assert_one_line_error(launch([*command(warm_config, tmp_path), *flags]), mentioned)


def test_the_launcher_needs_a_command():
    result = launch([*LAUNCH, "--processes=2"])
    assert result.returncode == 2
    assert "launch/local.py --processes=2 -- python" in result.stderr


@pytest.mark.parametrize(("processes", "kills"), [(1, 4), (2, 3)])
def test_kills_at_random_moments_change_no_bit(processes, kills):
    words = ("-m", "tests.kills", f"--kills={kills}", f"--processes={processes}", "--seed=1")
    result = launch([sys.executable, *words])
    assert result.returncode == 0, result.stderr
    assert "same bits" in result.stdout
