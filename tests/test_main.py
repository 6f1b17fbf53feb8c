"""The commands as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from facevae_jax.training.telemetry import read_metrics
from tests.conftest import REPOSITORY, assert_one_line_error, run_module

SLOW = pytest.mark.slow
TINY = (
    "--config=configs/quickstart.py",
    "--config.data.resolution=32",
    "--config.data.synthetic_train_images=128",
    "--config.data.synthetic_validation_images=37",
    "--config.model.filters=(8,16)",
    "--config.model.latent_dim=8",
    "--config.train.batch_size=16",
    "--config.train.evaluate_every_epochs=1",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    """A run of one epoch by the command."""
    workdir = tmp_path_factory.mktemp("main") / "run"
    result = run_module(
        "facevae_jax.main",
        *TINY,
        f"--config.data.data_dir={data_dir}",
        f"--workdir={workdir}",
        "--config.train.epochs=1",
        "--config.train.tensorboard=True",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for said in ("devices: 1 x cpu", "parameters", "feed: resident", "compiled in", "images/s", "validation", "done:"):
        assert said in result.stdout
    return workdir


@SLOW
def test_the_run_is_on_disk(workdir):
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
        "artifacts",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "pictures",
        "tensorboard",
    }
    assert json.loads((workdir / "config.json").read_text())["data"]["resolution"] == 32
    record = [r for r in read_metrics(workdir) if r["kind"] == "evaluation"][-1]
    assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl_term"])


@SLOW
@pytest.mark.parametrize("prior", ["standard", "gaussian"])
def test_sampling_from_the_checkpoint(workdir, tmp_path, prior):
    outputs = []
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        arguments = (f"--workdir={workdir}", "--count=10", f"--output={tmp_path / name}", f"--prior={prior}")
        result = run_module("facevae_jax.generate", "sample", *arguments, f"--seed={seed}")
        assert result.returncode == 0, result.stderr
        outputs.append(np.asarray(Image.open(tmp_path / name)))
    assert outputs[0].shape == (3 * 34 - 2, 4 * 34 - 2, 3)  # 10 faces of 32 pixels in a grid of 4 columns
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


@SLOW
def test_sampling_needs_a_run(workdir, tmp_path):
    assert_one_line_error(run_module("facevae_jax.generate", "sample", f"--workdir={tmp_path}"), str(tmp_path))
    assert_one_line_error(run_module("facevae_jax.generate", "sample"), "--workdir")
    assert_one_line_error(run_module("facevae_jax.generate", "smple", f"--workdir={workdir}"), "smple", "sample")
    assert_one_line_error(
        run_module("facevae_jax.generate", "sample", f"--workdir={workdir}", "--output=x.jpg"), "--output", ".png"
    )


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
        pytest.param(["--config.data.name=lost"], ["config.data.name", "lost"], marks=SLOW),
        pytest.param(
            ["--config.train.batch_size=999"], ["config.train.batch_size=999", "128 training images"], marks=SLOW
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_print_one_line(tmp_path, data_dir, arguments, mentioned):
    result = run_module(
        "facevae_jax.main", *TINY, f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path / 'w'}", *arguments
    )
    assert_one_line_error(result, *mentioned)


def test_missing_config_and_workdir_print_one_line(tmp_path):
    assert_one_line_error(run_module("facevae_jax.main", "--config=configs/quickstart.py"), "--workdir")
    assert_one_line_error(run_module("facevae_jax.main", f"--workdir={tmp_path}"), "--config")
    result = run_module("facevae_jax.main", "--config=configs/no.py", f"--workdir={tmp_path}")
    assert_one_line_error(result, "configs/no.py")


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
def test_an_unwritable_workdir_prints_one_line(tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    assert_one_line_error(run_module("facevae_jax.main", *TINY, f"--workdir={workdir}"), f"--workdir='{workdir}'")


@SLOW
@pytest.mark.parametrize("name", ["checkpoints", "pictures"])
def test_a_file_in_place_of_a_directory_prints_one_line(tmp_path, data_dir, name):
    (tmp_path / name).touch()
    result = run_module("facevae_jax.main", *TINY, f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path}")
    assert_one_line_error(result, f"{name}='{tmp_path / name}'")


@SLOW
def test_checkpoints_without_their_config_print_one_line(workdir, tmp_path, data_dir):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    arguments = (*TINY, f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path / 'run'}")
    assert_one_line_error(run_module("facevae_jax.main", *arguments), "config.json", "new workdir")
    assert not (tmp_path / "run" / "config.json").exists()


@SLOW
def test_damaged_scores_print_one_line(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/metrics/metrics"):
        path.write_bytes(b"")
    result = run_module("facevae_jax.generate", "sample", f"--workdir={tmp_path / 'run'}")
    assert_one_line_error(result, "metrics", "damaged")


@SLOW
def test_batches_that_devices_cannot_share_print_one_line(tmp_path):
    result = run_module("facevae_jax.main", *TINY, f"--workdir={tmp_path}", "--config.train.batch_size=20", devices=8)
    assert_one_line_error(result, "config.train.batch_size=20", "8 devices")


@SLOW
def test_garbage_in_the_workdir_prints_one_line(tmp_path, data_dir):
    (tmp_path / "config.json").write_text("[1]")
    result = run_module("facevae_jax.main", *TINY, f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path}")
    assert_one_line_error(result, "config.json")


@SLOW
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(tmp_path, data_dir, number):
    arguments = (*TINY, f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path}", "--config.train.epochs=50")
    environment = os.environ | {"XLA_FLAGS": ""}
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
    assert step < 400
    result = run_module("facevae_jax.main", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {step:,}" in result.stdout
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "evaluation"] == list(range(8, 401, 8))
