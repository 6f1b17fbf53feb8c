"""Commands in odd shells; `tests.environments` has them."""

import marshal
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from facevae_jax.core.errors import of_environment
from tests.conftest import REPOSITORY
from tests.environments import cases, failure, together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("environments")


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in together(cases())])
def test_a_command_ends_well_wherever_it_is_started(folder, case):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, and so would the command
    assert failure(case, folder) == ""


def python(*words: str, shell: str = "", cwd: pathlib.Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = f"{shell} exec {shlex.join([sys.executable, *words])}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_limit_on_files_leaves_no_compiled_module_cut_short(tmp_path):
    """In a copy of the package that nothing was compiled of."""
    shutil.copytree(REPOSITORY / "facevae_jax", tmp_path / "facevae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    words = ("-c", "import facevae_jax.core.settings, facevae_jax.core.errors")
    for shell, kept in (("ulimit -f 1;", False), ("", True)):
        result = python(*words, shell=shell, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert bool(list(tmp_path.rglob("errors*.pyc"))) == kept


def test_a_compiled_module_that_is_cut_short_is_named_with_its_remedy():
    with pytest.raises(EOFError) as caught:
        marshal.loads(marshal.dumps("x" * 99)[:50])
    assert "compileall" in of_environment(caught.value)


INTERRUPTED = """
import os, signal, time
from facevae_jax.core import command_line

class Lost:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, os.environ["SENT"]))
        time.sleep(0.01)

def main(arguments):
    lost = Lost()
    del lost
    time.sleep(60)

command_line.run(main)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_within_a_callback_ends_the_command_all_the_same(name):
    result = python("-c", INTERRUPTED, shell=f"export SENT={name};")
    assert (result.returncode, result.stderr) == (128 + signal.Signals[name], f"{name}: ended\n")


def test_there_are_cases_enough():
    assert len({case.name for case in cases()}) == len(cases()) >= 60
