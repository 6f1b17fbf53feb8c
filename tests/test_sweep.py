"""launch/sweep.py: every combination once, gone on with after a stop."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, assert_one_line_error
from tests.test_main import TINY


def sweep(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch/sweep.py", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_combinations():
    sys.path.insert(0, str(REPOSITORY / "launch"))
    try:
        from sweep import combinations, name_of
    finally:
        sys.path.pop(0)
    assert combinations([]) == [{}]
    assert combinations(["model.latent_dim=2,4", "train.seed=0"]) == [
        {"model.latent_dim": "2", "train.seed": "0"},
        {"model.latent_dim": "4", "train.seed": "0"},
    ]
    assert combinations(["a.b=1;a.c=2|a.b=3"]) == [{"a.b": "1", "a.c": "2"}, {"a.b": "3"}]
    assert name_of({"model.latent_dim": "2", "a.b": "x/y"}) == "latent_dim=2,b=x_y"
    for text in ("a", "a=", "=1", "a=1;b|c=2"):
        with pytest.raises(ValueError, match="must look like"):
            combinations([text])


def test_a_sweep(tmp_path, data_dir):
    config = tmp_path / "tiny.py"
    overrides = dict(word.removeprefix("--config.").split("=") for word in TINY if word.startswith("--config."))
    base = [*(f"{key}={value}" for key, value in overrides.items()), f"data.data_dir={data_dir}"]
    config.write_text((REPOSITORY / "configs/quickstart.py").read_text())
    words = [f"--config={config}", f"--output={tmp_path / 'out'}", "--evaluate=--importance_samples=", "--set"]
    words += [";".join(base), "--set", "model.kind=vae,pca"]
    first = sweep(*words, "--set", "train.seed=0")
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["settings"]["model.kind"] for row in rows] == ["vae", "pca"]
    assert all(row["scores"]["reconstruction"]["mse"] > 0 for row in rows)
    assert "kind=pca" in first.stdout.splitlines()[-1] + first.stdout.splitlines()[-2]
    again = sweep(*words, "--set", "train.seed=0")
    assert "1 of" not in again.stdout  # all is done
    other = sweep(*words, "--set", "train.seed=0", "--evaluate=--importance_images=3")
    assert "2 of 2" in other.stdout  # is evaluated anew, and not trained
    assert (tmp_path / "out" / "seed=0.log").exists() or list((tmp_path / "out").glob("*kind=vae,seed=0.log"))
    wrong = sweep(*words[:-1], "model.latent_dim=-1")
    assert wrong.returncode == 1
    assert "failed: " in wrong.stdout
    assert "config.model.latent_dim=-1" in wrong.stdout
    assert_one_line_error(sweep(*words[:2], "--set", "model.kind"), "--set 'model.kind'")


def test_a_stopped_sweep_lets_its_run_save(tmp_path, data_dir):
    config = tmp_path / "tiny.py"
    config.write_text((REPOSITORY / "configs/quickstart.py").read_text())
    settings = [word.removeprefix("--config.") for word in TINY if word.startswith("--config.")]
    settings += [f"data.data_dir={data_dir}", "train.epochs=100000"]
    words = [f"--config={config}", f"--output={tmp_path / 'out'}", "--set", ";".join(settings)]
    with subprocess.Popen(
        [sys.executable, "launch/sweep.py", *words], cwd=REPOSITORY, stderr=subprocess.PIPE
    ) as process:
        try:
            until = time.monotonic() + 240
            while not any("step " in log.read_text() for log in (tmp_path / "out").glob("*.log")):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"goes on" in said
    (log,) = (tmp_path / "out").glob("*.log")
    assert "same command" in log.read_text().splitlines()[-1]  # the run's own words, after its checkpoint
    assert list(log.with_name(log.name.removesuffix(".log")).glob("checkpoints/*"))
