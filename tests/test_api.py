"""The public names of the package, and its list of commands."""

import pydoc
import re
import shutil
import subprocess
import sys

import jax
import pytest

import facevae_jax
from facevae_jax import __main__ as commands
from facevae_jax.core.errors import UserError
from facevae_jax.generation.verbs import VERBS
from tests.conftest import REPOSITORY, assert_one_line_error, assert_same_trees, run_module


@pytest.mark.parametrize("name", facevae_jax.__all__)
def test_help_shows_every_public_name_with_its_docstring(name):
    text = pydoc.plain(pydoc.render_doc(facevae_jax))
    assert re.search(rf"^    (class )?{name}\(", text, flags=re.MULTILINE)
    assert getattr(facevae_jax, name).__doc__.splitlines()[0] in text
    assert name in dir(facevae_jax)


def test_errors_name_arguments_in_python_and_flags_in_a_command(tmp_path):
    with pytest.raises(UserError, match=r"^layout='foldr' .*folder"):
        facevae_jax.prepare(tmp_path, layout="foldr", resolution=64)
    result = run_module("facevae_jax.prepare", "--layout=foldr", f"--source={tmp_path}", "--resolution=64")
    assert_one_line_error(result, "--layout='foldr'")
    # The flags of a command that it tells to run stay flags.
    with pytest.raises(UserError, match=r"^source=.* try python -m facevae_jax.prepare --layout=folder --source="):
        facevae_jax.prepare(tmp_path, layout="celeba", resolution=64, data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: model.sample(0), "^count=0"),
        (lambda model: model.sample_stream(-1), "^count=-1"),
        (lambda model: model.sample(1, seed=-1), "^seed=-1"),
        (lambda model: model.sample(1, prior="gaussain"), "^prior='gaussain' .*gaussian"),
        (lambda model: model.sample(1, temperature=float("nan")), "^temperature=nan"),
        (lambda model: facevae_jax.evaluate(model, "tset"), "^split='tset'"),
    ],
)
def test_names_and_numbers_from_python_are_checked(finished, call, named):
    with pytest.raises(UserError, match=named):
        call(facevae_jax.load(finished[0]))


UNTYPED = """
import sys, facevae_jax, numpy
from facevae_jax.trained.directions import direction_of
calls = (
    lambda: direction_of(facevae_jax.load(sys.argv[1]), "smile", method="men"),
    lambda: facevae_jax.train({}, "/nowhere"),
    lambda: facevae_jax.prepare("x", layout="folder", resolution=64, on_bad_image="skp"),
    lambda: facevae_jax.load(None),
    lambda: facevae_jax.load("a\\0b"),
    lambda: facevae_jax.load(sys.argv[1], batch_size="8"),
    lambda: facevae_jax.read_faces(["a.png"], resolution=64),
    lambda: facevae_jax.read_faces("a.png", resolution="64"),
    lambda: model.sample(None),
    lambda: model.sample(True),
    lambda: model.sample(10**20),
    lambda: model.sample(1, seed=1.5),
    lambda: model.sample(1, temperature="1"),
    lambda: model.sample(1, prior=["gaussian"]),
    lambda: model.encode([model.decode(numpy.zeros((1, 8)))[0], model.decode(numpy.zeros((1, 8)))[0][::2]]),
    lambda: model.decode(numpy.full((1, 8), 1e300)),
    lambda: model.decode(numpy.zeros((1, 8), complex)),
)
model = facevae_jax.load(sys.argv[1])
for call in calls:
    try:
        call()
    except facevae_jax.core.errors.UserError as error:
        print(error)
"""


def test_what_types_would_have_refused_is_named_too(finished):
    """In a process of its own: here the types of arguments are checked at run time."""
    words = [sys.executable, "-c", UNTYPED, str(finished[0])]
    result = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    starts = ["method='men' ", "config: a dict", "on_bad_image='skp' ", "workdir=None", "workdir='a", "batch_size='8'"]
    starts += ["images=['a.png']", "resolution='64'", "count=None", "count=True", "count=100000", "seed=1.5"]
    starts += ["temperature='1'", "prior=['gaussian']", "images of diff", "codes that are not finite", "codes of shape"]
    lines = result.stdout.splitlines()
    assert [start for start, line in zip(starts, lines, strict=True) if not line.startswith(start)] == []


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = facevae_jax.no_such_name


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


def test_the_list_and_importing_the_package_need_no_library():
    command = [sys.executable, "-X", "importtime", "-m", "facevae_jax"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "prepare" in result.stdout
    assert not re.search(r"\b(jax|numpy|absl)\b", result.stderr)


def test_a_command_runs_by_its_name():
    assert_one_line_error(run_module("facevae_jax", "tarin"), "'tarin'", "train")
    for name in ("train", "main"):
        assert_one_line_error(run_module("facevae_jax", name, "--wrokdir=x"), "wrokdir", "workdir")


MISTAKES = [
    ("evaluate", "--workdir={run} --importance_samples=x", "--importance_samples"),
    ("evaluate", "--workdir={run} --features=./x.py:f", "--features='./x.py:f'"),
    ("evaluate", "--workdir={run} --inception_weights=/nowhere", "--inception_weights"),
    ("evaluate", "--workdir={run} --json=/proc/x/y.json", "--json"),
    ("explore", "", "--workdir"),
    ("explore", "--workdir={run} --prior=gausian", "--prior='gausian' is not one of standard, gaussian"),
    ("explore", "--workdir={run} --dimensions=0,x", "--dimensions='0,x'"),
    ("explore", "--workdir={run} --port=65536", "65536"),
    ("export", "--output=/tmp/new", "--workdir"),
    ("export", "--workdir={run}", "--output"),
    ("export", "--workdir={run} --output={run}", "--output='{run}'"),
    ("export", "--workdir={run} --output={run}/config.json/x", "--output"),
    ("generate", "smple --workdir={run}", "sample"),
    ("generate", "sample", "--workdir"),
    ("generate", "sample --workdir={empty}", "{empty}"),
    ("generate", "edit --workdir={run} --alpha=x", "--alpha"),
    ("report", "--workdir={empty}", "{empty}"),
    ("report", "--workdir={empty}/no", "--workdir='{empty}/no'"),
    ("report", "--workdir={run} --compare={empty}/no", "--compare='{empty}/no'"),
    ("report", "--workdir={run} --output=x.pdf", "--output='x.pdf'"),
    ("report", "--workdir={run} more", "'more'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flags", "mentioned"), MISTAKES)
def test_mistakes_of_the_tools_are_reported_in_one_line(workdir, tmp_path, command, flags, mentioned):
    folders = {"run": workdir, "empty": tmp_path}
    result = run_module(f"facevae_jax.{command}", *flags.format(**folders).split())
    assert_one_line_error(result, mentioned.format(**folders))
    assert list(tmp_path.iterdir()) == []
