"""The public names of the package, and its list of commands."""

import pydoc
import re
import shutil
import subprocess
import sys

import jax
import pytest
from PIL import Image

import facevae_jax
from facevae_jax import __main__ as commands
from facevae_jax.core.errors import UserError
from facevae_jax.data.prepared import reading
from facevae_jax.generation.verbs import VERBS
from tests.conftest import REPOSITORY, assert_one_line_error, assert_same_trees, run_module


@pytest.mark.parametrize("name", facevae_jax.__all__)
def test_help_shows_every_public_name_with_its_docstring(name):
    text = pydoc.plain(pydoc.render_doc(facevae_jax))
    assert re.search(rf"^    (class )?{name}\(", text, flags=re.MULTILINE)
    assert getattr(facevae_jax, name).__doc__.splitlines()[0] in text
    assert name in dir(facevae_jax)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = facevae_jax.no_such_name


def test_importing_the_package_is_cheap_and_commands_do_not_hide_functions():
    program = (
        "import sys, facevae_jax; print('jax' in sys.modules, 'numpy' in sys.modules)\n"
        "import facevae_jax.prepare; print(callable(facevae_jax.prepare))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.split() == ["False", "False", "True"]


def test_prepare_makes_a_dataset_and_returns_its_folder(tmp_path, capsys):
    (tmp_path / "faces").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 48), (i, 2 * i, 3 * i)).save(tmp_path / "faces" / f"{i}.png")
    arguments = {"layout": "folder", "resolution": 32, "data_dir": tmp_path, "workers": 1}
    folder = facevae_jax.prepare(tmp_path / "faces", **arguments, name="mine")
    assert folder == reading.find_dataset(tmp_path, name="mine", resolution=32)
    assert reading.split_sizes(folder) == {"train": 5, "validation": 1}
    assert facevae_jax.prepare(tmp_path / "faces", **arguments, name="mine") == folder
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="resolution=33"):
        facevae_jax.prepare(tmp_path / "faces", **arguments | {"resolution": 33})


def test_train_and_evaluate(tiny_config, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    model = facevae_jax.train(tiny_config, workdir)  # is finished: nothing is trained again
    assert_same_trees(model.variables, jax.device_get(finished[1].evaluation_variables))
    assert list(workdir.rglob("moments-*.npz"))  # so that samples need no data
    record = facevae_jax.evaluate(model, draws=())
    assert (record["step"], record["split"], record["images"]) == (20, "validation", 37)
    with pytest.raises(UserError, match="test"):
        facevae_jax.evaluate(model, "test")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_all_commands_are_listed(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["facevae_jax", *arguments])
    commands.main()
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    runnable = {path.stem for path in (REPOSITORY / "facevae_jax").glob("[!_]*.py") if "__main__" in path.read_text()}
    assert set(listed) == runnable
    assert all(verb in commands.COMMANDS["generate"] for verb in VERBS)


def test_the_list_needs_no_library():
    command = [sys.executable, "-X", "importtime", "-m", "facevae_jax"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "prepare" in result.stdout
    assert not re.search(r"\b(jax|numpy|absl)\b", result.stderr)


def test_a_command_runs_by_its_name():
    assert_one_line_error(run_module("facevae_jax", "tarin"), "'tarin'", "train")
    for name in ("train", "main"):
        assert_one_line_error(run_module("facevae_jax", name, "--wrokdir=x"), "wrokdir", "workdir")
