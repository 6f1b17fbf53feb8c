"""Eight virtual CPU devices, so that every test of training is one of sharded training too."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jaxlib.version

# Most of the time of a test goes into compiling programs that run for milliseconds: LLVM's cheaper passes suffice, and
# XLA's older code for fusions compiles in a quarter of the time. jaxlib 0.12 lacks it, and ends a process that asks for
# it. Tests that start commands pass these flags on.
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jaxlib.version.__version_info__ < (0, 11):
    CHEAP += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit these
    # Many tests compile the same program; the directory goes when the session ends.
    _COMPILED = tempfile.TemporaryDirectory(prefix="facevae-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    eight = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {eight} {CHEAP}"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - named below

# Every shape and type in a signature of the package is checked as the tests run it, and ranks are never promoted.
install_import_hook("facevae_jax", "tests.typecheck.check")
jax.config.update("jax_numpy_rank_promotion", "raise")

from facevae_jax.config import DataConfig, RunConfig, TrainConfig
from facevae_jax.core.settings import flatten
from facevae_jax.latents.priors import flow_fit
from facevae_jax.models import vae
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainState
from facevae_jax.training.telemetry import read_metrics

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_steps_of_the_flow():
    """Where a test samples from the default prior, its quality does not matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flow_fit, "STEPS", (10, 10))
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where drawn faces are kept, drawn once a session."""
    return tmp_path_factory.mktemp("data")


def tiny(data_dir: pathlib.Path) -> RunConfig:
    """The smallest run that has all of a run's parts: 10 steps an epoch, a ragged last evaluation batch."""
    return RunConfig(
        data=DataConfig(
            data_dir=str(data_dir), resolution=32, synthetic_train_images=165, synthetic_validation_images=37
        ),
        model=vae.Config(latent_dim=8, filters=(8, 16), dropout_rate=0.1),
        train=TrainConfig(
            batch_size=16, epochs=2, learning_rate=5e-3, warmup_steps=0, log_every_steps=1, steps_per_dispatch=4
        ),
    )


@pytest.fixture(scope="session")
def tiny_config(data_dir: pathlib.Path) -> RunConfig:
    """Its config."""
    return tiny(data_dir)


@pytest.fixture(scope="session")
def finished(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TrainState]:
    """The workdir and the last state of a run of 20 steps that nothing interrupted; copy it to change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(tiny_config, workdir)


def change(config: RunConfig, **sections) -> RunConfig:
    """The config with some settings of some sections changed."""
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **replaced)


def flags_of(config: RunConfig, **sections) -> list[str]:
    """Flags of `facevae_jax.main` for a config with some settings changed; the workdir is missing."""
    settings = flatten(change(config, **sections).to_dict()).items()
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings}
    return ["--config=quickstart", *(f"--config.{key}={value}" for key, value in values.items())]


def losses_of(workdir: pathlib.Path) -> list[tuple[str, int, float]]:
    """(kind, step, loss) of every line of a run's metrics."""
    return [(record["kind"], record["step"], record["loss"]) for record in read_metrics(workdir)]


def assert_same_trees(left, right) -> None:
    """Equal in every bit."""
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_nearly(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to a value halfway between two, which another batch size may round the other way."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


def run_module(module: str, *arguments: object, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `python -m module arguments` from the repository's root, as a user does."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {CHEAP}"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def messages(result: subprocess.CompletedProcess) -> list[str]:
    """The lines of standard error, without those of progress, which a loop of over half a minute prints."""
    return [line for line in result.stderr.strip().splitlines() if "%|" not in line]


def assert_one_line_error(result: subprocess.CompletedProcess, *mentioned: str) -> None:
    """Exit code 2 and one line on standard error that mentions the key, path or value, and no traceback."""
    assert result.returncode == 2, result.stderr
    lines = messages(result)
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in mentioned:
        assert text in lines[0]


@pytest.fixture(scope="session")
def workdir(finished: tuple[pathlib.Path, TrainState], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the finished run, for tests that only read it or fit priors and directions to it."""
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def trained(workdir: pathlib.Path) -> TrainedModel:
    """The model of that run."""
    return load(workdir)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one way to change a golden file."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew from what the code gives")
