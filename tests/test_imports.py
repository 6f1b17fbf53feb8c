"""Imports point one way, and the core never needs TensorFlow."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

from PIL import Image

from tests.conftest import REPOSITORY, assert_one_line_error

# A module may import from its own layer and from those before it.
LAYERS = (
    ("core",),
    ("models",),
    ("config",),
    ("data",),
    ("objective",),
    ("inference", "latents"),
    ("training",),
    ("trained", "planning"),
    ("exporting", "generation"),
    ("metrics",),
    ("reporting", "exploring"),
    ("prepare", "generate", "report", "explore", "export", "evaluate"),
    ("api",),
    ("main",),
    ("plan", "convert"),
    ("__main__",),
)
PACKAGE = REPOSITORY / "facevae_jax"


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports, in functions too; a name in a string, as in `KINDS`, is none."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            of_names = {f"{node.module}.{alias.name}": node.module for alias in node.names}
            found |= {name if name in MODULES else module for name, module in of_names.items()}
    return found & MODULES.keys() - {"facevae_jax"}


GRAPH = {name: imported(path) for name, path in MODULES.items() if name != "facevae_jax"}


def test_imports_point_one_way():
    def layer(module: str) -> int:
        return next(i for i, names in enumerate(LAYERS) if module.split(".")[1] in names)

    wrong = [(module, other) for module, others in GRAPH.items() for other in others if layer(other) > layer(module)]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    assert sum(map(len, GRAPH.values())) > len(GRAPH) > 50
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises a CycleError that names a circle


def test_preparation_imports_no_jax_and_training_neither_tensorflow_nor_its_datasets():
    program = (
        "import sys, facevae_jax.prepare; assert 'jax' not in sys.modules; import facevae_jax.training.loop;"
        "print([m for m in sys.modules if m.startswith('tensorflow')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_preparation_on_one_machine_needs_no_beam(tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "faces" / f"{i}.png")
    program = (
        "import sys; sys.modules['apache_beam'] = None\n"
        "from facevae_jax.prepare import define_flags, main\nfrom facevae_jax.core import command_line\n"
        "define_flags(); command_line.run(main)"
    )
    flags = ["--layout=folder", f"--source={tmp_path / 'faces'}", "--resolution=32", f"--data_dir={tmp_path}"]
    command = [sys.executable, "-c", program, *flags]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert run(command).returncode == 0
    assert_one_line_error(run([*command, "--overwrite", "--beam_options="]), "--beam_options", "facevae-jax[beam]")
