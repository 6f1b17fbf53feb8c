"""`--config` takes the name of a config in every directory, and the path of any file."""

import os
import pathlib
import subprocess
import sys

import pytest

from facevae_jax.core import named_configs
from facevae_jax.core.errors import UserError
from tests.conftest import REPOSITORY, assert_one_line_error

CONFIGS = REPOSITORY / "configs"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path) -> pathlib.Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str) -> str:
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    pathlib.Path(path).write_text("def get_config(resolution='64'): ...")
    return path


@pytest.mark.parametrize("given", ["ffhq128", "ffhq128.py", "configs/ffhq128.py", "./configs/ffhq128.py"])
def test_a_name_is_found_from_every_directory(given):
    assert named_configs.find(given) == str(CONFIGS / "ffhq128.py")


def test_files_come_before_names_unless_the_name_is_bare(monkeypatch, elsewhere):
    for path in ("mine", "mine.py", "deep/own.py", "configs/ffhq128.py", "ffhq128.py", "./ffhq128"):
        assert pathlib.Path(named_configs.find(write(path))) == pathlib.Path(path)
    assert named_configs.find("ffhq128") == str(CONFIGS / "ffhq128.py")
    assert named_configs.find("mine.py:128") == "mine.py:128"
    monkeypatch.setenv("HOME", str(elsewhere))
    assert named_configs.find("~/mine.py") == str(elsewhere / "mine.py")


@pytest.mark.parametrize(
    ("given", "mentioned"),
    [
        ("ffhq12", "ffhq128"),
        ("configs/quickstrat.py", "quickstart"),
        ("other/ffhq128.py", "ffhq128"),
        ("~/ffhq.py", "ffhq"),
        ("zzz", "celeba64"),
        ("", "celeba64"),
        ("__init__", "quickstart"),
        ("~nobody-of-this-name/x.py", "nobody-of-this-name"),
        ("x" * 300, "config"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_names(given, mentioned):
    with pytest.raises(UserError, match=mentioned) as caught:
        named_configs.find(given)
    assert given[:40] in str(caught.value)


def test_only_the_value_of_the_flag_is_replaced():
    path = str(CONFIGS / "gdl128.py")
    rest = ["--config.data.name=gdl128", "--workdir=gdl128", "gdl128"]
    assert named_configs.with_paths(["x", "--config=gdl128", *rest]) == ["x", f"--config={path}", *rest]
    assert named_configs.with_paths(["x", "-config=gdl128", *rest]) == ["x", f"-config={path}", *rest]
    assert named_configs.with_paths(["x", *rest, "--config", "gdl128"]) == ["x", *rest, "--config", path]
    assert named_configs.with_paths(["x", "--config"]) == ["x", "--config"]


def test_the_flag_to_type_names_a_config_that_exists_here():
    write("configs/mine64.py")
    assert named_configs.flag("mine64") == "--config=configs/mine64.py"
    assert named_configs.flag("celeba64") == "--config=celeba64"
    assert named_configs.flag("mine128") is None


def run(python_path: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    """Trains from the current directory by the package that is in `python_path`."""
    command = [sys.executable, "-m", "facevae_jax.main", *flags]
    environment = os.environ | {"PYTHONPATH": str(python_path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_names_and_overrides_on_the_command_line(elsewhere):
    overridden = run(REPOSITORY, "--config", "quickstart", "--workdir=run", "--config.data.resolution=100")
    assert_one_line_error(overridden, "config.data.resolution=100")
    assert_one_line_error(run(REPOSITORY, "--config=quikstart", "--workdir=run"), "'quikstart'", "quickstart")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_an_installed_package_has_the_configs(elsewhere):
    pytest.importorskip("setuptools", minversion="77")
    source, target = elsewhere / "source", elsewhere / "installed"
    source.mkdir()
    for name in ("facevae_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPOSITORY / name)  # what the build writes stays out of the repository
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--target={target}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300)
    assert (target / "facevae_jax" / "configs" / "quickstart.py").is_file()
    for given in ("quickstart", "configs/quickstart.py"):
        flags = (f"--config={given}", "--workdir=run", "--config.data.resolution=100")
        assert_one_line_error(run(target, *flags), "config.data.resolution=100")
