"""The page about a run: one file that says what metrics.jsonl says, whatever is missing or badly named."""

import base64
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import write_json
from facevae_jax.latents.priors import mixture
from facevae_jax.metrics import scores
from facevae_jax.reporting import latents, write
from facevae_jax.reporting.page import Note
from facevae_jax.reporting.write import write_report
from facevae_jax.trained import ranking
from facevae_jax.trained.directions import direction_of
from facevae_jax.trained.loading import load
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import REPOSITORY, assert_one_line_error, change, messages, run_module

HOSTILE = """<script>alert("1 & 2")</script>'$x_{y$"""
ANCHORS = [
    *("attributes", "edits", "reconstructions", "interpolation", "samples", "morph", "traversal", "scores"),
    *("rate-distortion", "training", "dimensions", "distribution", "map", "priors", "provenance", "settings"),
]


class Page:
    """The page as a parser sees it that repairs nothing."""

    def __init__(self, text: str) -> None:
        closed = re.sub(r"<(meta|img)( [^>]*)>", r"<\1\2/>", text.removeprefix("<!doctype html>"))
        self.root = ElementTree.fromstring(closed)
        sections = {section.get("id"): "\n".join(section.itertext()) for section in self.root.iter("section")}
        self.sections = {anchor: " ".join(text.split()) for anchor, text in sections.items()}

    def values(self, tag: str, name: str) -> list[str | None]:
        return [element.get(name) for element in self.root.iter(tag)]


@pytest.fixture(scope="module")
def first(tmp_path_factory, workdir):
    """The run that the page is about."""
    ignored = shutil.ignore_patterns("artifacts")
    return shutil.copytree(workdir, tmp_path_factory.mktemp("report") / "first", ignore=ignored)


@pytest.fixture(scope="module")
def other(tmp_path_factory, first, tiny_config):
    """Another run, by what a comparison reads of it."""
    other = tmp_path_factory.mktemp("report") / "second"
    other.mkdir()
    config = change(tiny_config, objective={"r_loss_factor": 500.0, "kl_weight": 2.0})
    write_json(other / "config.json", config.to_dict())
    records = [record | {"mse": record["mse"] * 2, "kl": record["kl"] / 2} for record in read_metrics(first)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return other


@pytest.fixture(scope="module")
def page(first, other):
    write_report(first, first / "report.html", compare=[other])
    return Page((first / "report.html").read_text())


@pytest.fixture
def copied(first, page, tmp_path):
    """The run, to be changed; what was fitted for its page is kept."""
    return shutil.copytree(first, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html"))


def test_the_page_is_one_file_without_scripts(page):
    elements = list(page.root.iter())
    used = [value for element in elements for name in ("src", "href") if (value := element.get(name))]
    assert used
    assert all(value.startswith(("data:image/", "#")) for value in used)
    assert {"script", "link", "iframe", "object"}.isdisjoint(element.tag for element in elements)
    assert not any(name.startswith("on") for element in elements for name in element.attrib)
    style = page.root.findtext("head/style")
    assert "url(" not in style
    assert "@import" not in style
    assert {href.removeprefix("#") for href in page.values("a", "href")} <= {element.get("id") for element in elements}


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
    assert list(page.sections) == ANCHORS
    for anchor in ANCHORS:
        assert len(page.sections[anchor]) > 60
        assert "Left out" not in page.sections[anchor], page.sections[anchor]


def test_attributes_and_edits_come_best_first_and_weak_ones_are_marked(page, first):
    scores = ranking.attribute_scores(load(first))
    listed = [element for element in page.root.iter("li") if element.find("span") is not None]
    assert [element.findtext("span").strip().replace(" ", "_") for element in listed] == list(scores)
    assert [element.get("class") == "weak" for element in listed] == [score < 0.2 for score in scores.values()]
    (edits,) = (section for section in page.root.iter("section") if section.get("id") == "edits")
    captions = [caption.text for caption in edits.iter("figcaption")]
    assert [caption.partition(",")[0] for caption in captions] == list(scores)[:6]
    assert ["weak" in caption for caption in captions] == [score < 0.2 for score in list(scores.values())[:6]]


def test_scores_of_attributes_are_those_of_their_directions_and_are_kept(copied, monkeypatch):
    trained = load(copied)
    trained.artifacts.drop(ranking.ARTIFACT)
    scores = ranking.attribute_scores(trained)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    # Products with all attributes at once may add up in another order than those with one.
    assert scores["skin_tone"] == pytest.approx(direction_of(trained, "skin_tone").score, rel=1e-9)
    assert scores["glasses"] != direction_of(trained, "glasses").score  # the direction has a balanced accuracy
    monkeypatch.setattr(ranking, "cross_validate", None)
    assert ranking.attribute_scores(load(copied)) == scores


def test_figures_are_those_of_the_metrics(page, first, other):
    last, others = ([r for r in read_metrics(folder) if r["kind"] == "evaluation"][-1] for folder in (first, other))
    scores = page.sections["scores"]
    for key, form in (("loss", ",.2f"), ("mse", ".6f"), ("kl", ",.2f"), ("nll", ",.2f"), ("negative_elbo", ",.2f")):
        assert f" {format(last[key], form)} " in scores
    for key, form in (("loss", ",.2f"), ("mse", ".6f"), ("kl", ",.2f")):
        assert f" {format(others[key], form)} " in scores
    assert f"step {last['step']}" in scores


def test_the_mse_is_one_figure_that_is_explained_once(page, first):
    last = [r for r in read_metrics(first) if r["kind"] == "evaluation"][-1]
    assert [cell.text for cell in page.root.iter("dd")].count(f"{last['mse']:.6f}") == 1
    assert " ".join(page.root.itertext()).lower().count("mean squared error") == 1


def test_a_run_without_validation_images_is_not_said_to_have_any(copied):
    records = [record | ({"split": "train"} if "split" in record else {}) for record in read_metrics(copied)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report(copied, copied / "report.html")
    page = Page((copied / "report.html").read_text())
    for anchor in ("scores", "reconstructions", "priors"):
        assert "training images (there are too few validation images)" in page.sections[anchor]


def test_dimensions_add_up_to_the_evaluation(page, first):
    last = [r for r in read_metrics(first) if r["kind"] == "evaluation"][-1]
    kl = re.search(r"([\d.]+) nats", page.sections["dimensions"])
    assert float(kl[1]) == pytest.approx(last["kl"], rel=0.02, abs=0.01)


def test_settings_that_differ_are_marked(page, tiny_config):
    settings = page.sections["settings"]
    assert "latent_dim 8 *" in settings
    assert "ema_decay 0.0 *" not in settings
    assert str(tiny_config.data.data_dir) in settings


def test_without_its_data_a_run_still_has_a_page(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["name"] = "lost"
    (copied / "config.json").write_text(json.dumps(config))
    write_report(copied, copied / "report.html")
    page = Page((copied / "report.html").read_text())
    # Nothing was fitted to data of that name: only N(0, I) is there to sample from.
    empty = {"attributes", "reconstructions", "dimensions", "distribution", "map", "priors", "traversal", "edits"}
    assert {anchor for anchor in ANCHORS if "Left out" in page.sections[anchor]} == empty | {"samples"}
    ordered = sorted(ANCHORS, key=lambda anchor: anchor in empty)
    assert list(page.sections) == ordered
    assert "standard prior" in page.sections["morph"]


def test_before_the_first_evaluation_a_run_has_a_page(copied):
    (copied / "metrics.jsonl").unlink()
    shutil.rmtree(copied / "pictures")
    write_report(copied, copied / "report.html")
    page = Page((copied / "report.html").read_text())
    assert "not been evaluated yet" in page.sections["scores"]
    assert "not been evaluated yet" in page.sections["rate-distortion"]
    assert "no pictures" in page.sections["training"]
    assert "Left out" not in page.sections["reconstructions"]


def test_what_an_evaluation_found_of_the_checkpoint_is_shown(copied):
    trained = load(copied)
    record = scores.evaluate(trained, "validation", draws=(1, 2), bound_images=5)
    write_json(copied / "evaluation_validation.json", record)
    write_json(copied / "evaluation_train.json", record | {"step": trained.step - 1})  # of another checkpoint
    (shown,) = write.evaluated(trained)
    assert "37 validation images" in shown.caption
    rows = {name: value for name, value, _ in shown.rows}
    assert "MSE" not in rows  # of the posterior means: another one than the page's
    assert rows["SSIM"] == f"{record['reconstruction']['ssim']:.4f}"
    assert "Bound, K = 2" in rows
    write_json(copied / "evaluation_train.json", {"step": trained.step})
    assert isinstance(write.evaluated(trained)[0], Note)


def test_fitted_priors_are_scored_where_they_are_there(copied, monkeypatch):
    monkeypatch.setattr(mixture, "COMPONENTS", (1,))
    monkeypatch.setattr(mixture, "MIN_DRAWS", 1_000)
    trained = load(copied)
    posterior = trained.codes.posterior("validation")
    assert [row[0] for row in latents.priors(trained, posterior, images="").rows] == ["standard", "gaussian"]
    trained.prior("mixture")
    rows = latents.priors(trained, posterior, images="").rows
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


@pytest.mark.slow
def test_the_command(first, other, tmp_path):
    output = tmp_path / "page.html"
    flags = (f"--workdir={first}", f"--compare={other},{first}", f"--output={output}")
    result = run_module("facevae_jax.report", *flags)
    assert (result.returncode, messages(result)) == (0, []), result.stderr
    assert str(output) in result.stdout
    assert "second" in Page(output.read_text()).sections["scores"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_reported_in_one_line(first, missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from facevae_jax import report; from facevae_jax.core import command_line; command_line.run(report.main)"
    )
    command = [sys.executable, "-c", program, f"--workdir={first}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert_one_line_error(result, "facevae-jax[report]")
