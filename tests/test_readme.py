"""The commands and links in README.md and in the configs' docstrings work, and CI runs the same commands."""

import ast
import re

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
CONFIGS = sorted((REPOSITORY / "configs").glob("[!_]*.py"))


def test_ci_runs_the_test_command_of_the_readme():
    _, tests = re.findall(r"^(pip install .* && .*)$", README, flags=re.MULTILINE)
    assert tests in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_links_inside_the_repository_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_readme_is_short_and_names_every_config():
    assert len(README.splitlines()) <= 150
    assert [path.stem for path in CONFIGS if f"`{path.stem}`" not in README] == []
    assert [name for name in re.findall(r"configs/\w+\.py", README) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_its_command_and_what_was_measured(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    assert f"Command: python -m facevae_jax.main --config=configs/{path.name} --workdir=" in docstring
    measured = docstring.partition("Hardware, time and score: ")[2]
    assert measured.startswith("not yet measured.") or re.search(r"MSE 0\.\d+.*KL \d+", measured, flags=re.DOTALL)
