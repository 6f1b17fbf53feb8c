"""The pictures of README.md and docs/ are those that the current code makes: docs/make_pictures.py makes them anew."""

import importlib.util
import json
import re

import pytest

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_of_the_current_code(pictures):
    record = json.loads(pictures.RECORD.read_text())
    assert set(record) == set(pictures.PICTURES)
    for name, (_, arguments) in pictures.PICTURES.items():
        assert record[name]["sha256"] == pictures.picture_hash(name), f"{name}: run docs/make_pictures.py"
        assert record[name]["code"] == pictures.code_of(name), f"{name}: run docs/make_pictures.py"
        assert " ".join(arguments) in record[name]["command"]


def test_every_picture_that_is_shown_is_made_by_the_script(pictures):
    texts = {path: path.read_text() for path in [REPOSITORY / "README.md", *DOCS.glob("*.md")]}
    shown = {name for text in texts.values() for name in re.findall(r"!\[[^]]*\]\((?:docs/)?([\w./]+)\)", text)}
    charts = {"throughput_cpu.png"}  # by benchmarks.report
    assert shown - charts == set(pictures.PICTURES)
