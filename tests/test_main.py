"""The commands as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from facevae_jax.training.telemetry import read_metrics
from tests.conftest import CHEAP, REPOSITORY, assert_one_line_error, flags_of, messages, run_module

SLOW = pytest.mark.slow


@SLOW
def test_a_run_by_the_command(tiny_config, tmp_path):
    flags = flags_of(tiny_config, train={"epochs": 1, "tensorboard": True})
    result = run_module("facevae_jax.main", *flags, f"--workdir={tmp_path}")
    assert (result.returncode, messages(result)) == (0, []), result.stderr
    for said in ("devices: 1 x cpu", "parameters", "feed: resident", "compiled in", "images/s", "validation", "done:"):
        assert said in result.stdout
    left = {".lock", "artifacts", "checkpoints", "config.json", "data.json", "metrics.jsonl", "pictures", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert json.loads((tmp_path / "config.json").read_text())["data"]["resolution"] == 32
    records = read_metrics(tmp_path)
    record = [r for r in records if r["kind"] == "evaluation"][-1]
    assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl_term"])
    assert record["epoch"] == 1
    times = [r["time"] for r in records]
    assert times == sorted(times)
    assert 0 <= time.time() - times[-1] < 600


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["--config.data.resolutoin=64"], ["--config.data.resolutoin", "--config.data.resolution"]),
        (["--config.data.resolution=100"], ["config.data.resolution=100", "32 to 1024"]),
        (["--config.data.resolution=big"], ["config.data.resolution"]),
        (["--config.model.latent_dim=0"], ["config.model.latent_dim=0"]),
        (["--config.train.warmup_steps=10000000000"], ["config.train.warmup_steps=10000000000", "below"]),
        (["--wrokdir=x"], ["wrokdir", "workdir"]),
        (["extra"], ["extra"]),
        pytest.param(
            ["--config.data.data_dir=~nobody-of-this-name/x"],
            ["config.data.data_dir='~nobody-of-this-name/x'"],
            marks=SLOW,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_print_one_line(tmp_path, arguments, mentioned):
    result = run_module("facevae_jax.main", "--config=quickstart", f"--workdir={tmp_path / 'w'}", *arguments)
    assert_one_line_error(result, *mentioned)


def test_missing_config_and_workdir_print_one_line(tmp_path):
    assert_one_line_error(run_module("facevae_jax.main", "--config=configs/quickstart.py"), "--workdir")
    assert_one_line_error(run_module("facevae_jax.main", f"--workdir={tmp_path}"), "--config")


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("from facevae_jax.config import DataConfig\nDataConfig(resolution=100)", "config.data.resolution=100"),
        ("from facevae_jax.models import vae\nvae.Config(latent_dims=3)", "latent_dims"),
        ("def get_config(:", "SyntaxError"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("x = 1", "get_config"),
        ("def get_config():\n    pass", "get_config()"),
    ],
)
def test_a_fault_in_a_config_file_prints_one_line(tmp_path, text, mentioned):
    path = tmp_path / "mine.py"
    path.write_text(text)
    result = run_module("facevae_jax.main", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert_one_line_error(result, str(path), mentioned)


@SLOW
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(tmp_path, tiny_config, number):
    arguments = [*flags_of(tiny_config, train={"epochs": 20, "log_every_steps": 50}), f"--workdir={tmp_path}"]
    environment = os.environ | {"XLA_FLAGS": CHEAP}
    command = [sys.executable, "-m", "facevae_jax.main", *arguments, "--config.train.log_every_steps=1"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "train" in line and line.startswith("step"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 128 + number
    assert f"{number.name}: saved" in rest
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step < 200
    result = run_module("facevae_jax.main", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {step:,}" in result.stdout
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "evaluation"] == list(range(10, 201, 10))
