"""Parts of the page: names of any kind, pictures of training, and figures of the latent space."""

import base64
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from facevae_jax.data.dataset import AttributeTable
from facevae_jax.data.layouts.types import Attribute
from facevae_jax.inference import Encoded
from facevae_jax.metrics.scores import active_units, kl_by_dimension
from facevae_jax.reporting import curves, latents
from facevae_jax.reporting.page import COLORS, INK, Bar, Bars, Note, Table, chart, drawing, render, sheet
from facevae_jax.reporting.runs import Series, open_runs, printable, shortened, tell_apart
from facevae_jax.trained.codes import CodeTable
from facevae_jax.training.telemetry import read_metrics
from tests.test_report import HOSTILE, Page


@pytest.fixture(autouse=True)
def style():
    with drawing():
        yield


@pytest.fixture
def run_folder(workdir, tmp_path):
    """A run to change."""
    return shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("artifacts"))


def test_names_are_escaped():
    def table(*attributes: Attribute) -> CodeTable:
        values = np.random.default_rng(0).integers(0, 2, (40, len(attributes))).astype(np.float32)
        values[:3] = np.nan
        points = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
        return CodeTable(Encoded(points, points), tuple("x" * 40), AttributeTable(attributes, values))

    attributes = (
        Attribute(HOSTILE, "binary"),
        Attribute("_hidden", "continuous"),
        Attribute("hair", "categorical", ("_a", "<b>")),
    )
    parts = [Note(HOSTILE), Table(HOSTILE, [HOSTILE], []), Bars([Bar(HOSTILE, 0.5, weak=True)])]
    blocks = [*latents.maps(table(*attributes), {}), *latents.maps(table(), {}), *parts]
    faces = sheet(np.zeros((1, 2, 32, 32, 3), np.uint8), alt=HOSTILE, caption=HOSTILE, scale=[HOSTILE])
    said = {"title": HOSTILE, "summary": {HOSTILE: HOSTILE}, "images": HOSTILE, "active_variance": 0.01, "weak": 0.2}
    page = render(sections={"reconstructions": [*blocks, faces]}, **said, written="", version="").decode()
    parsed = Page(page)
    assert HOSTILE in list(parsed.root.itertext())
    assert HOSTILE in parsed.values("img", "alt")
    assert "<script" not in page
    assert any("3 without the label" in alt for alt in parsed.values("img", "alt"))
    for source in parsed.values("img", "src"):
        if "svg" in source:
            ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))


def test_strips_show_the_first_row_of_samples(run_folder):
    (run,) = open_runs([run_folder])
    paths = curves.shown_pictures(run)
    assert list(paths) == [10, 20]
    path = paths[20]
    faces = curves.first_row(path, resolution=32)
    assert faces.shape == (8, 32, 32, 3)
    whole = np.asarray(Image.open(path))
    np.testing.assert_array_equal(faces[3], whole[:32, 3 * 34 : 3 * 34 + 32])
    path.write_bytes(path.read_bytes()[:100])
    assert len(curves.strips(run)) == 2  # the introduction, and the other step


def test_groups_of_latents_have_a_curve_each(run_folder):
    records = [record | {"rates": [record["kl"] / 4, record["kl"] * 3 / 4]} for record in read_metrics(run_folder)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = open_runs([run_folder])
    *_, picture = curves.loss_curves([run])
    assert "2 groups" in picture.alt
    expected = np.outer(run.series("evaluation", "kl").values, [1 / 4, 3 / 4])
    np.testing.assert_allclose(run.series("evaluation", "rates").values, expected)


def test_many_groups_have_a_curve_for_each_resolution(run_folder):
    of = {"rates": [1.0, 2.0, 3.0], "resolutions": ["1x1", "8x8"], "rates_by_resolution": [1.0, 5.0]}
    records = [record | of for record in read_metrics(run_folder)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    *_, picture = curves.loss_curves(open_runs([run_folder]))
    assert "2 resolutions" in picture.alt


STEPS = np.arange(1, 41) * 100


@pytest.mark.parametrize(
    ("values", "cut"),
    [
        (np.where(STEPS <= 300, 1000.0, 20 + 1000 / STEPS), "up to 1,000"),
        (np.where(STEPS <= 300, -50.0, 20 + 1000 / STEPS), "down to -50"),
        (np.linspace(30, 20, 40), ""),  # the first values flatten nothing
        (np.where(STEPS == 100, np.nan, 20 + STEPS / 100), ""),
        (np.where(STEPS <= 300, 1000.0, 20.0), ""),
        (np.full(40, np.nan), ""),
    ],
)
def test_early_values_do_not_flatten_the_later_ones(values, cut):
    axes = Figure().add_subplot()
    axes.plot(STEPS, values)
    said = curves.fit_axis(axes, Series(STEPS, values))
    low, high = axes.get_ylim()
    later = values[STEPS > 400]
    if cut:
        assert cut in said
        assert axes.get_title("right") == cut
        assert 0.5 < np.ptp(later) / (high - low) <= 1
        assert low < later.min() < later.max() < high
    else:
        assert said == axes.get_title("right") == ""
        assert not np.isfinite(values).any() or low <= np.nanmin(values) < np.nanmax(values) <= high


def test_charts_have_colors_for_dark_screens():
    figure = Figure()
    axes = figure.add_subplot(title="title", xlabel="step")
    for number in range(len(COLORS)):
        axes.plot([0, 1], [number, 1])
    svg = base64.b64decode(chart(figure, alt="lines").uri.partition(",")[2]).decode()
    style, _, drawn = svg.partition("</style>")
    assert "prefers-color-scheme:dark" in style
    assert not any(color in drawn for color in (*COLORS, INK))
    assert "fill: #ffffff" not in drawn


def test_the_gaps_between_faces_have_the_color_of_the_page():
    faces = np.full((2, 3, 8, 8, 3), 255, np.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(sheet(faces, alt="faces").uri.partition(",")[2])))
    opaque = np.asarray(image)[..., 3] == 255
    assert opaque.sum() == 2 * 3 * 8 * 8
    assert opaque[:8, :8].all()
    assert not opaque[8:10].any()


def test_active_units_and_order():
    variances = [0.009, 1.0, 0.011, 0.0]
    mean = (np.array([[-1], [1]] * 50) * np.sqrt(variances)).astype(np.float32)
    posterior = Encoded(mean, np.zeros_like(mean))
    assert active_units(posterior) == 2
    assert latents.by_activity(posterior) == [1, 2, 0, 3]
    np.testing.assert_allclose(kl_by_dimension(posterior), 0.5 * np.square(mean).mean(axis=0), rtol=1e-4)


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


def test_runs_are_told_apart(tmp_path):
    a, b, c = (tmp_path / name for name in ("a/run", "b/run", "c/other"))
    assert tell_apart([a, c]) == ["run", "other"]
    assert tell_apart([a, b, c]) == ["a/run", "b/run", "c/other"]
    assert printable("a\nb\x00\udc80ü") == "a?b??ü"
    assert shortened("x" * 40) == "x" * 13 + "…" + "x" * 14


def test_dollar_signs_and_underscores_are_drawn_as_they_are(run_folder):
    hostile = run_folder.rename(run_folder.parent / "_$a_{b$ & 'c'\nd")
    runs = open_runs([hostile])
    assert runs[0].name == "_$a_{b$ & 'c'?d"
    assert len(curves.rate_distortion(runs)) == 1
    record = {"kind": "evaluation", "step": 30, "loss": None, "mse": None, "kl": None}  # not finite
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    runs = open_runs([hostile, hostile / ".." / hostile.name])
    assert len(runs) == 1
    assert len(curves.rate_distortion(runs)) == 1
    assert curves.curve(runs, "loss").alt == "Loss over optimizer steps"
