"""launch/sweep.py: it runs every combination once and resumes after a stop."""

import json
import runpy
import signal
import subprocess
import sys
import time
import types

import pytest

from tests.conftest import REPOSITORY, assert_one_line_error

SWEEP = REPOSITORY / "launch" / "sweep.py"
CONFIG = f"--config={REPOSITORY / 'configs' / 'quickstart.py'}"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SWEEP, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def tiny(data_dir):
    """A --set of one choice that makes the smallest run."""
    settings = {
        "data.data_dir": data_dir,
        "data.resolution": 32,
        "data.synthetic_train_images": 128,
        "data.synthetic_validation_images": 37,
        "model.latent_dim": 8,
        "train.batch_size": 16,
        "train.epochs": 1,
    }
    return "--set=" + ";".join(f"{key}={value}" for key, value in settings.items())


def test_combinations_and_table():
    sweep = types.SimpleNamespace(**runpy.run_path(str(SWEEP)))
    assert sweep.combinations([]) == [{}]
    assert sweep.combinations(["model.latent_dim=2,4", "train.seed=0"]) == [
        {"model.latent_dim": "2", "train.seed": "0"},
        {"model.latent_dim": "4", "train.seed": "0"},
    ]
    assert sweep.combinations(["a.b=1;a.c=2|a.b=3"]) == [{"a.b": "1", "a.c": "2"}, {"a.b": "3"}]
    assert sweep.name_of({"model.latent_dim": "2", "a.b": "x/y"}) == "latent_dim=2,b=x_y"
    for text in ("a", "a=", "=1", "a=1;b|c=2"):
        with pytest.raises(ValueError, match="must look like"):
            sweep.combinations([text])
    rows = [{"settings": {"a": str(mse)}, "scores": {"reconstruction": {"mse": mse}}} for mse in (0.2, 0.1)]
    rows[0]["scores"]["likelihood"] = {"rate": 1234.0}
    found = [line.split() for line in sweep.table(rows).splitlines()]
    assert found == [["MSE", "rate", "settings"], ["0.10000", "-", "a=0.1"], ["0.20000", "1,234", "a=0.2"]]


@pytest.mark.slow
def test_a_sweep(tmp_path, tiny):
    words = [CONFIG, f"--output={tmp_path / 'out'}", tiny, "--evaluate=--importance_samples="]
    kinds = "--set=model.kind=vae,autoencoder"
    first = run(*words, kinds)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["settings"]["model.kind"] for row in rows] == ["vae", "autoencoder"]
    assert all(row["scores"]["reconstruction"]["mse"] > 0 for row in rows)
    assert "kind=autoencoder" in first.stdout.splitlines()[-1] + first.stdout.splitlines()[-2]
    assert "1 of" not in run(*words, kinds).stdout  # all is done
    other = run(*words, "--set=model.kind=vae", "--evaluate=--importance_images=3")
    assert "1 of 1" in other.stdout  # evaluated anew
    (log,) = (tmp_path / "out").glob("*kind=vae.log")
    assert "nothing is left to do" in log.read_text()  # but not trained
    wrong = run(*words, "--set=model.latent_dim=-1")
    assert wrong.returncode == 1
    assert "config.model.latent_dim=-1" in wrong.stdout
    assert_one_line_error(run(*words, "--set=model.kind"), "--set 'model.kind'")


@pytest.mark.slow
def test_a_stopped_sweep_lets_its_run_save(tmp_path, tiny):
    words = [CONFIG, f"--output={tmp_path / 'out'}", f"{tiny};train.epochs=100000;train.log_every_steps=10"]
    with subprocess.Popen([sys.executable, SWEEP, *words], cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 600
            while not any("step " in log.read_text() for log in (tmp_path / "out").glob("*.log")):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    (log,) = (tmp_path / "out").glob("*.log")
    assert "SIGINT: saved" in log.read_text()
    assert list(log.with_name(log.name.removesuffix(".log")).glob("checkpoints/*"))
