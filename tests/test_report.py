"""The page about a run: one file that says what metrics.jsonl says, whatever is missing or badly named."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from facevae_jax.data.labels import AttributeTable
from facevae_jax.data.layouts import Attribute
from facevae_jax.errors import UserError
from facevae_jax.files import write_json
from facevae_jax.generation import fitting
from facevae_jax.generation.latent_tables import LatentTable
from facevae_jax.generation.loading import load
from facevae_jax.metrics import scores
from facevae_jax.models.inference import Encoded
from facevae_jax.reporting import curves, latents, write
from facevae_jax.reporting.page import Note, Table, render, section, sheet
from facevae_jax.reporting.runs import open_runs, printable, shortened, tell_apart
from facevae_jax.reporting.write import write_report
from facevae_jax.training import loop
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import REPOSITORY, assert_one_line_error, change, run_module

VOID = {"meta", "img", "link", "br", "input"}
HOSTILE = """<script>alert("1 & 2")</script>'$x_{y$"""
ANCHORS = [
    *("scores", "reconstructions", "samples", "training", "rate-distortion", "dimensions", "distribution", "map"),
    *("priors", "interpolation", "morph", "traversal", "edits", "provenance", "settings"),
]


class Page(html.parser.HTMLParser):
    """The page as a browser sees it, without mending it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.by_section: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.by_section[self._section] = ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())
        self.by_section[self._section] += f" {data.strip()}"

    def values(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("report") / "first"
    loop.train(tiny_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def other(tmp_path_factory, workdir, tiny_config):
    """Another run, by what a comparison reads of it."""
    other = tmp_path_factory.mktemp("report") / "second"
    other.mkdir()
    config = change(tiny_config, objective={"r_loss_factor": 500.0, "kl_weight": 2.0})
    write_json(other / "config.json", config.to_dict())
    records = [record | {"mse": record["mse"] * 2, "kl": record["kl"] / 2} for record in read_metrics(workdir)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return other


@pytest.fixture(scope="module")
def page(workdir, other):
    output = workdir / "report.html"
    said = write_report(workdir, output, compare=[other])
    assert said.startswith(f"{output}: {len(ANCHORS)} sections")
    return Page(output.read_text())


@pytest.fixture
def copied(workdir, tmp_path):
    """The run, to be damaged."""
    return shutil.copytree(workdir, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html"))


def test_the_page_is_one_file_without_scripts(page):
    used = [value for tag, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert used
    assert all(value.startswith(("data:image/", "#")) for value in used)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    style = next(text for text in page.texts if "max-width" in text)
    assert "url(" not in style
    assert "@import" not in style
    targets = {value for name in ("id",) for _, attributes in page.tags if (value := attributes.get(name))}
    assert {href.removeprefix("#") for href in page.values("a", "href")} <= targets


def test_images_are_whole_and_described(page):
    sources = page.values("img", "src")
    assert len(sources) > 20
    assert all(page.values("img", "alt"))
    for source in sources:
        kind, _, data = source.partition(";base64,")
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/svg+xml":
            for element in ElementTree.fromstring(content).iter():
                for name, value in element.attrib.items():
                    assert not name.endswith("href") or value.startswith(("#", "data:image/png"))
        else:
            assert kind == "data:image/png"
            assert content.startswith(b"\x89PNG")


def test_every_section_is_there_with_its_explanation(page):
    assert list(page.by_section)[1:] == ANCHORS
    assert ("html", {"lang": "en"}) in page.tags
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.tags]
    headings = [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings == ["h1", *["h2"] * len(ANCHORS)]
    for anchor in ANCHORS:
        assert len(page.by_section[anchor]) > 60
        assert "Left out" not in page.by_section[anchor], page.by_section[anchor]
    assert all(name in page.by_section["edits"] for name in ("smile", "glasses", "hair_length", "skin_tone", "turn"))


def test_figures_are_those_of_the_metrics(page, workdir, other):
    last, others = ([r for r in read_metrics(folder) if r["kind"] == "evaluation"][-1] for folder in (workdir, other))
    scores = page.by_section["scores"]
    for key, form in (("loss", ",.2f"), ("mse", ".6f"), ("kl", ",.2f"), ("nll", ",.2f"), ("negative_elbo", ",.2f")):
        assert f" {format(last[key], form)} " in scores
    for key, form in (("loss", ",.2f"), ("mse", ".6f"), ("kl", ",.2f")):
        assert f" {format(others[key], form)} " in scores
    assert f"step {last['step']}" in scores


def test_the_compared_run_is_in_scores_and_charts(page):
    assert "second" in page.by_section["scores"]
    assert "r = 500, beta = 2" in page.by_section["scores"]
    alt = next(alt for alt in page.values("img", "alt") if alt.startswith("Distortion against rate"))
    assert "first" in alt
    assert "second" in alt


def test_dimensions_add_up_to_the_evaluation(page, workdir):
    last = [r for r in read_metrics(workdir) if r["kind"] == "evaluation"][-1]
    said = re.search(
        r"(\d+) of 8 dimensions are active; together all carry ([\d.]+) nats", page.by_section["dimensions"]
    )
    assert float(said[2]) == pytest.approx(last["kl"], rel=0.02, abs=0.01)


def test_settings_that_differ_are_marked(page, tiny_config):
    settings = page.by_section["settings"]
    assert "latent_dim 8 *" in settings.replace("  ", " ")
    assert "ema_decay 0.0 *" not in settings.replace("  ", " ")
    assert str(tiny_config.data.data_dir) in settings


def test_the_command(workdir, other, tmp_path):
    output = tmp_path / "page.html"
    flags = (f"--workdir={workdir}", f"--compare={other},{workdir}", f"--output={output}")
    result = run_module("facevae_jax.report", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"{output}: ")
    assert "second" in Page(output.read_text()).by_section["scores"]
    assert list(tmp_path.iterdir()) == [output]


def test_mistakes_are_told_in_one_line(workdir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copy(workdir / "config.json", untrained)
    for arguments, mentioned in (
        ([], ["--workdir"]),
        ([f"--workdir={tmp_path / 'no'}"], ["--workdir", str(tmp_path / "no"), "does not exist"]),
        ([f"--workdir={empty}"], [str(empty), "no run"]),
        ([f"--workdir={untrained}"], [str(untrained), "no checkpoint yet"]),
        ([f"--workdir={workdir}", f"--compare={tmp_path / 'no'}"], ["--compare", "does not exist"]),
        ([f"--workdir={workdir}", f"--compare={empty}"], [str(empty), "no run"]),
        ([f"--workdir={workdir}", "--output=x.pdf"], ["--output='x.pdf'", ".html"]),
        ([f"--workdir={workdir}", "more"], ["more"]),
    ):
        assert_one_line_error(run_module("facevae_jax.report", *arguments), *mentioned)
    assert [path.name for path in untrained.iterdir()] == ["config.json"]


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_told_in_one_line(workdir, missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from facevae_jax import command_line, report; command_line.run(report.main)"
    )
    command = [sys.executable, "-c", program, f"--workdir={workdir}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert result.returncode == 2
    assert result.stderr == 'error: The report needs jinja2 and matplotlib: pip install "facevae-jax[report]".\n'


def test_without_its_data_a_run_still_has_a_page(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["name"] = HOSTILE
    (copied / "config.json").write_text(json.dumps(config))
    write_report(copied, copied / "report.html")
    page = Page((copied / "report.html").read_text())
    assert list(page.by_section)[1:] == ANCHORS
    for anchor in ("reconstructions", "dimensions", "distribution", "map", "priors", "edits"):
        assert re.search(r"Left out: .*is not prepared", page.by_section[anchor]), anchor
    for anchor in (
        "scores",
        "samples",
        "training",
        "rate-distortion",
        "interpolation",
        "morph",
        "traversal",
        "settings",
    ):
        assert "Left out" not in page.by_section[anchor]
    assert "samples from the gaussian prior" in page.by_section["morph"]
    assert f"{HOSTILE}, 32x32" in page.texts  # as text: it was escaped
    assert "script" not in {tag for tag, _ in page.tags}


def test_before_the_first_evaluation_a_run_has_a_page(copied):
    (copied / "metrics.jsonl").unlink()
    shutil.rmtree(copied / "pictures")
    write_report(copied, copied / "report.html")
    page = Page((copied / "report.html").read_text())
    assert "not been evaluated yet" in page.by_section["scores"]
    assert "not been evaluated yet" in page.by_section["rate-distortion"]
    assert "no pictures" in page.by_section["training"]
    assert "Left out" not in page.by_section["reconstructions"]


def test_what_an_evaluation_found_of_the_checkpoint_is_shown(copied):
    trained = load(copied)
    record = scores.evaluate(trained, "validation", draws=(1, 2), bound_images=5)
    write_json(copied / "evaluation_validation.json", record)
    write_json(copied / "evaluation_train.json", record | {"step": trained.step - 1})  # of another checkpoint
    (shown,) = write.evaluated(trained)
    assert shown.caption == "Evaluation of the validation split, 37 images"
    rows = {name: value for name, value, _ in shown.rows}
    assert rows["SSIM"] == f"{record['reconstruction']['ssim']:.4f}"
    assert "Bound, K = 2" in rows
    write_json(copied / "evaluation_train.json", {"step": trained.step})
    assert isinstance(write.evaluated(trained)[0], Note)


def test_fitted_priors_are_scored_where_they_are_there(copied, monkeypatch):
    monkeypatch.setattr(fitting, "COMPONENTS", (1,))
    monkeypatch.setattr(fitting, "MIN_DRAWS", 1_000)
    trained = load(copied)
    assert latents.available_priors(trained) == ["gaussian"]
    fitting.fitted_prior(trained, "mixture")
    assert latents.available_priors(trained) == ["gaussian", "mixture"]
    rows = latents.priors(trained).rows
    assert [row[0] for row in rows] == ["standard", "gaussian", "mixture"]
    last = [r for r in read_metrics(copied) if r["kind"] == "evaluation"][-1]
    rates = [float(row[1]) for row in rows]
    assert rates[0] == pytest.approx(last["kl"], rel=0.2)  # one draw each from the posteriors of 37 images
    assert float(rows[1][2]) == pytest.approx(rates[1] - rates[0], abs=0.011)


def test_a_failure_leaves_the_page_before(copied):
    output = copied / "report.html"
    output.write_text("before")
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        write_report(copied, output)
    assert output.read_text() == "before"


def test_names_are_escaped():
    def table(*attributes: Attribute) -> LatentTable:
        values = np.random.default_rng(0).integers(0, 2, (40, len(attributes))).astype(np.float32)
        values[:3] = np.nan
        points = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
        return LatentTable(points, points, tuple("x" * 40), AttributeTable(attributes, values))

    attributes = (
        Attribute(HOSTILE, "binary"),
        Attribute("_hidden", "continuous"),
        Attribute("hair", "categorical", ("_a", "<b>")),
    )
    blocks = [*latents.maps(table(*attributes)), *latents.maps(table()), Note(HOSTILE), Table(HOSTILE, [HOSTILE], [])]
    faces = sheet(np.zeros((1, 2, 32, 32, 3), np.uint8), alt=HOSTILE, caption=HOSTILE, scale=[HOSTILE])
    sections = [section("x", HOSTILE, HOSTILE, lambda: [*blocks, faces])]
    page = render(title=HOSTILE, summary={HOSTILE: HOSTILE}, sections=sections, written="", version="").decode()
    parsed = Page(page)
    assert HOSTILE in parsed.texts
    assert HOSTILE in parsed.values("img", "alt")
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "<script" not in page
    assert any("3 without the label are grey" in alt for alt in parsed.values("img", "alt"))
    for source in parsed.values("img", "src"):
        if "svg" in source:
            ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))


def test_strips_show_the_first_row_of_samples(copied, workdir):
    (run,) = open_runs([copied])
    steps = curves.shown_steps(run)
    assert steps == [10, 20]
    path = curves.picture_path(run, 20)
    faces = curves.first_row(path, resolution=32)
    assert faces.shape == (8, 32, 32, 3)
    whole = np.asarray(Image.open(path))
    np.testing.assert_array_equal(faces[3], whole[:32, 3 * 34 : 3 * 34 + 32])
    assert curves.first_row(path, resolution=64) is None
    path.write_bytes(path.read_bytes()[:100])
    assert len(curves.strips(run)) == 2  # the words, and the other step


def test_active_units_and_order():
    variances = [0.009, 1.0, 0.011, 0.0]
    mean = (np.array([[-1], [1]] * 50) * np.sqrt(variances)).astype(np.float32)
    posterior = Encoded(mean, np.zeros_like(mean))
    assert latents.active_units(posterior) == 2
    assert latents.by_activity(posterior) == [1, 2, 0, 3]
    np.testing.assert_allclose(latents.kl_by_dimension(posterior), 0.5 * np.square(mean).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize(("images", "size"), [(50, 5), (50, 1), (2, 5), (1, 5)])
def test_principal_components(images, size):
    points = np.random.default_rng(0).normal(size=(images, size)) * np.arange(size, 0, -1)
    projected, shares = latents.project(points)
    assert projected.shape == (images, 2)
    values = np.linalg.eigvalsh(np.cov(points.T).reshape(size, size))[::-1] if images > 1 else np.zeros(size)
    expected = (np.append(values, 0.0)[:2] / (values.sum() or 1.0)).clip(0)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    np.testing.assert_allclose(
        projected.T @ projected / max(images - 1, 1), np.diag(np.append(values, 0)[:2]), atol=1e-9
    )


def test_runs_are_told_apart(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in ("a/run", "b/run", "c/other"))
    assert tell_apart([a, c]) == ["run", "other"]
    assert tell_apart([a, b, c]) == ["a/run", "b/run", "c/other"]
    assert printable("a\nb\x00\udc80ü") == "a?b??ü"
    assert shortened("x" * 40) == "x" * 13 + "…" + "x" * 14
    assert len(shortened("x" * 40)) == 28


def test_dollar_signs_and_underscores_are_drawn_as_they_are(copied):
    hostile = copied.rename(copied.parent / "_$a_{b$ & 'c'\nd")
    runs = open_runs([hostile])
    assert runs[0].name == "_$a_{b$ & 'c'?d"
    assert len(curves.rate_distortion(runs)) == 1
    record = {"kind": "evaluation", "step": 30, "loss": None, "mse": None, "kl": None}  # not finite
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    runs = open_runs([hostile, hostile / ".." / hostile.name])
    assert len(runs) == 1
    assert len(curves.rate_distortion(runs)) == 1
    assert curves.curve(runs, "loss").alt == "Loss over optimiser steps"
