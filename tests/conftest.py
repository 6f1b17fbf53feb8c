"""Eight virtual CPU devices, so that every test of training is one of sharded training too."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

# Many tests compile the same program; the directory goes when the session ends.
_COMPILED = tempfile.TemporaryDirectory(prefix="facevae-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import pytest

from facevae_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where drawn faces are kept, drawn once a session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def tiny_config(data_dir: pathlib.Path) -> RunConfig:
    """The smallest run that has all of a run's parts: 10 steps an epoch, a ragged last evaluation batch."""
    return RunConfig(
        data=DataConfig(
            data_dir=str(data_dir), resolution=32, synthetic_train_images=165, synthetic_validation_images=37
        ),
        model=ModelConfig(latent_dim=8, filters=(8, 16), dropout_rate=0.1),
        train=TrainConfig(
            batch_size=16, epochs=2, learning_rate=5e-3, warmup_steps=0, log_every_steps=1, steps_per_dispatch=4
        ),
    )


def change(config: RunConfig, **sections) -> RunConfig:
    """The config with some settings of some sections changed."""
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **replaced)


def run_module(module: str, *arguments: object, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `python -m module arguments` from the repository's root, as a user does."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line_error(result: subprocess.CompletedProcess, *mentioned: str) -> None:
    """Exit code 2 and one line on standard error that mentions the key, path or value, and no traceback."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in mentioned:
        assert text in lines[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one way to change a golden file."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew from what the code gives")
