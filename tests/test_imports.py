"""Imports point one way, and the core never needs TensorFlow."""

import ast
import pathlib
import subprocess
import sys

from PIL import Image

from tests.conftest import REPOSITORY

# A module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "files", "random", "config", "pictures", "progress", "startup", "hosts", "signals"),
    ("data",),
    ("models",),
    ("objective",),
    ("latents",),
    ("training",),
    ("exporting",),
    ("generation",),
    ("metrics",),
    ("reporting", "exploring"),
    ("command_line", "main", "prepare", "generate", "verify", "report", "explore", "export", "evaluate"),
)
PACKAGE = REPOSITORY / "facevae_jax"


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def imported(path: pathlib.Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "facevae_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("facevae_jax."):
            found.add(node.module.removeprefix("facevae_jax."))
    return found


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for other in imported(path):
            assert layer(other) <= layer(module), f"{module} imports {other}"


def test_training_imports_neither_tensorflow_nor_its_datasets():
    program = "import sys, facevae_jax.training.loop; print([m for m in sys.modules if m.startswith('tensorflow')])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_preparation_on_one_machine_needs_no_beam(tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "faces" / f"{i}.png")
    program = (
        "import sys; sys.modules['apache_beam'] = None\n"
        "from facevae_jax import command_line, prepare; prepare.define_flags(); command_line.run(prepare.main)"
    )
    flags = ["--layout=folder", f"--source={tmp_path / 'faces'}", "--resolution=32", f"--data_dir={tmp_path}"]
    for given, said in (([], "prepared: "), (["--overwrite", "--beam_options="], "")):
        command = [sys.executable, "-c", program, *flags, *given]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert result.stdout.startswith(said), result.stderr
    assert result.returncode == 2
    assert result.stderr == 'error: --beam_options needs Apache Beam: pip install "facevae-jax[beam]".\n'
