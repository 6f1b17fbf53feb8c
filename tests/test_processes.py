"""Several processes as one run, on one machine, by the launcher that users have."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from facevae_jax.training.loop import train
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import REPOSITORY, change

STEPS = 20
README = (REPOSITORY / "README.md").read_text()
LAUNCH = (sys.executable, "launch/local.py")


def command(config, workdir, **train_settings):
    """The command of one process for the tiny config."""
    settings = {
        "data.data_dir": config.data.data_dir,
        "data.resolution": 32,
        "data.synthetic_train_images": 165,
        "data.synthetic_validation_images": 37,
        "model.latent_dim": 8,
        "model.filters": "(8,16)",
        "model.dropout_rate": 0.1,
        "objective.r_loss_factor": config.objective.r_loss_factor,
        "train.schedule": "constant",
        "train.learning_rate": config.train.learning_rate,
        "train.warmup_steps": 20,
        "train.batch_size": 16,
        "train.epochs": 2,
        "train.evaluate_every_epochs": 1,
        "train.log_every_steps": 1,
        "train.steps_per_dispatch": 4,
        **{f"train.{key}": value for key, value in train_settings.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [
        *(sys.executable, "-m", "facevae_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags)
    ]


def launch(words, *, processes, devices=1, restarts=0, timeout=300, **options):
    arguments = (f"--processes={processes}", f"--devices={devices}", f"--restarts={restarts}")
    return subprocess.run(
        [*LAUNCH, *arguments, "--", *words],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


def start(words, *, processes, restarts=0, **options):
    arguments = (f"--processes={processes}", "--devices=1", f"--restarts={restarts}")
    return subprocess.Popen(
        [*LAUNCH, *arguments, "--", *words],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def members(launcher):
    """Process numbers of a launcher's processes, in order."""
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in children.stdout.split()]


def losses(workdir):
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(workdir)]


def assert_same_losses(workdir, other):
    mine, theirs = losses(workdir), losses(other)
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in theirs]
    np.testing.assert_allclose([e[2] for e in mine], [e[2] for e in theirs], rtol=1e-5)


def record(workdir, step):
    """The checksums of all arrays of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())


@pytest.fixture(scope="module")
def warm_config(tiny_config):
    """The tiny run at a pace at which Adam does not amplify the rounding of sums in another order beyond 1e-5."""
    return change(tiny_config, train={"warmup_steps": 20, "learning_rate": 2e-3})


@pytest.fixture(scope="module")
def alone(warm_config, tmp_path_factory):
    """The run in this process, on 8 devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train(warm_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def pair(warm_config, tmp_path_factory):
    """The run in two processes that nothing interrupted, by README's command with small settings."""
    workdir = tmp_path_factory.mktemp("pair")
    line = next(line for line in README.splitlines() if line.startswith("python launch/local.py"))
    typed = [sys.executable if word == "python" else word for word in shlex.split(line)]
    settings = [f"--workdir={workdir}", *command(warm_config, workdir)[5:]]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*typed, *settings], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_two_processes_are_one_run(pair, alone):
    workdir, result = pair
    assert "devices: 2 x cpu in 2 processes" in result.stdout
    assert "communication: 0." in result.stdout
    assert_same_losses(workdir, alone)
    said_by = {line.split("]")[0] for line in result.stdout.splitlines() if "Gloo" not in line}
    assert said_by == {"[0"}
    steps = [r["step"] for r in read_metrics(workdir) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # each once


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["sharded", "streamed"])
def test_each_process_brings_its_own_rows(alone, warm_config, tmp_path, feed):
    words = [*command(warm_config, tmp_path), f"--config.data.feed={feed}"]
    assert launch(words, processes=2, devices=2).returncode == 0
    assert_same_losses(tmp_path, alone)


def go_on(workdir, config, *, processes, devices):
    """Goes on with the run in `workdir` to its end on so many processes and devices of each."""
    result = launch(command(config, workdir), processes=processes, devices=devices)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 7" in result.stdout or "nothing is left" in result.stdout


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes(alone, warm_config, tmp_path):
    train(warm_config, tmp_path, should_stop=lambda step: step == 7)
    go_on(tmp_path, warm_config, processes=2, devices=4)
    assert_same_losses(tmp_path, alone)


@pytest.mark.slow
def test_runs_go_on_on_any_other_topology(warm_config, tmp_path):
    """{1x1, 1x8, 2x1, 2x4, 4x2} (processes x devices): saved by each after 7 steps, finished by each."""
    topologies = [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2)]
    for processes, devices in topologies:
        workdir = tmp_path / f"{processes}x{devices}"
        words = command(warm_config, workdir, steps=7)
        assert launch(words, processes=processes, devices=devices).returncode == 0
    reference = None
    for saved in topologies:
        for processes, devices in topologies:
            workdir = tmp_path / f"{saved}-{processes}x{devices}"
            shutil.copytree(tmp_path / f"{saved[0]}x{saved[1]}", workdir)
            go_on(workdir, warm_config, processes=processes, devices=devices)
            reference = reference or workdir
            assert_same_losses(workdir, reference)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_after_a_kill_the_launcher_starts_all_again_to_the_same_bits(pair, warm_config, tmp_path, victim):
    words = [*command(warm_config, tmp_path, checkpoint_every_steps=3), "--heartbeat_seconds=10"]
    with start(words, processes=2, restarts=1) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if re.search(r"step +8/", line):
                os.kill(members(launcher)[victim], signal.SIGKILL)
                break
        killed = time.monotonic()
        rest = []
        for line in launcher.stdout:
            rest.append(line)
            if "starting all again" in line:
                assert time.monotonic() - killed < 20
        said = "".join(rest)
        assert launcher.wait(timeout=60) == 0, said
    assert f"process {victim} of 2 was ended by SIGKILL" in said
    assert "lost the others after step" in said or "another task died" in said, said
    assert "Traceback" not in said or victim == 0  # without its coordinator a process is ended by JAX itself
    assert re.search(r"resuming from step \d", said)
    assert record(tmp_path, STEPS) == record(pair[0], STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_and_saves_all(warm_config, tmp_path, number):
    words = command(warm_config, tmp_path, epochs=100)
    with start(words, processes=2, restarts=1) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if re.search(r"step +8/", line):
                os.kill(members(launcher)[1], number)
                break
        rest = launcher.stdout.read()
        assert launcher.wait(timeout=60) == 128 + number
    assert f"{number.name}: saved" in rest
    assert "starting all again" not in rest
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert 8 <= max(saved) < 1000
    assert max(r["step"] for r in read_metrics(tmp_path)) == max(saved)


def test_a_stuck_process_ends_the_run_with_the_last_finished_step(warm_config, tmp_path):
    words = [*command(warm_config, tmp_path, epochs=100, watchdog_seconds=20), "--heartbeat_seconds=300"]
    with start(words, processes=2) as launcher:
        assert launcher.stdout is not None
        said = list(itertools.takewhile(lambda line: not re.search(r"step +8/", line), launcher.stdout))
        assert launcher.poll() is None, said  # nothing was stuck yet
        stuck = members(launcher)[1]
        os.kill(stuck, signal.SIGSTOP)
        for line in launcher.stdout:
            if "nothing was finished for" in line:
                assert re.search(r"the last finished step is \d+", line)
                break
        os.kill(stuck, signal.SIGKILL)
        launcher.stdout.read()
        assert launcher.wait(timeout=60) == 75


def test_a_mistake_of_one_process_is_told_once_by_all(warm_config, tmp_path):
    (tmp_path / "file").touch()
    result = launch(command(warm_config, tmp_path / "file" / "run"), processes=2)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("[") and "Gloo" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("[0] error: --workdir=")


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [
        (["--processes=2"], "belong together"),
        (["--coordinator=here", "--processes=2", "--process_id=0"], "--coordinator='here' must be HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process_id=2"], "--process_id=2 must be from 0"),
    ],
)
def test_an_incomplete_cluster_is_told_in_one_line(warm_config, tmp_path, flags, mentioned):
    words = [*command(warm_config, tmp_path), *flags]
    result = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert mentioned in result.stderr


def test_the_launcher_needs_a_command():
    result = subprocess.run([*LAUNCH, "--processes=2"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert result.returncode == 2
    assert "give at least one process and a command" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 4)])
def test_kills_at_random_moments_change_no_bit(processes, kills):
    words = ("-m", "tests.kills", f"--kills={kills}", f"--processes={processes}", "--seed=1")
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert result.returncode == 0, result.stderr
    assert "the bits are those of a run without kills" in result.stdout
