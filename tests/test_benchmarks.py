"""The benchmarks at a tiny size: their units, by a clock of the tests, and that documents show what was recorded."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import editing, record_sweep, report, throughput
from benchmarks.suites import compile, end_to_end, input, prepare, roofline, sampling, step, timing, training
from configs import gdl128
from facevae_jax.config import DataConfig, RunConfig, TrainConfig
from facevae_jax.core.errors import UserError
from facevae_jax.models import vae
from tests.conftest import REPOSITORY, assert_one_line_error, run_module

PAPER = RunConfig.from_config_dict(gdl128.get_config())
TINY = timing.Options(
    config=RunConfig(
        data=DataConfig(resolution=32),
        model=vae.Config(latent_dim=4, filters=(8, 16)),
        train=TrainConfig(batch_size=8, steps_per_dispatch=4, convolution="plain"),  # compiles soonest
    ),
    rounds=2,
    seconds=0.01,
    images=64,
)


@pytest.fixture
def clock(monkeypatch):
    """A second passes between two looks at the clock, whatever happens in between."""
    monkeypatch.setattr(roofline, "MATMUL_SIDE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)
    for module in (input, timing, training):
        ticks = itertools.count(0.0)
        monkeypatch.setattr(module, "time", type("Clock", (), {"perf_counter": staticmethod(ticks.__next__)}))


def test_the_cost_of_a_step_agrees_with_the_layers():
    filters, area, dense = PAPER.model.filters, 9, 3 * (8 * 8 * 64) * 200  # dense: mean, log variance, and back
    pairs = list(zip((3, *filters[:-1]), filters, strict=True))
    sides = [128 >> stage for stage in range(1, 5)]
    convolutions = sum(side**2 * area * a * b for side, (a, b) in zip(sides, pairs, strict=True))
    outputs = 2 * sum(f * side**2 for f, side in zip(filters, sides, strict=True)) + 2 * 200 + 3 * 128**2
    weights = 2 * sum(area * a * b for a, b in pairs) + dense
    flops, moved = roofline.training_cost(PAPER, "float32")
    # The decoder's convolutions cost what the encoder's do. XLA counts normalization too, but no products with padding.
    assert flops == pytest.approx(3 * 2 * (2 * convolutions + dense), rel=0.05)
    assert moved == pytest.approx(5 * 4 * outputs + 3 * 3 * 128**2 + 10 * 4 * weights / 150)


def test_rates_are_units_per_second_and_cases_take_turns():
    order = []

    def case(name: str, seconds: float) -> timing.Case:
        def run(count: int) -> float:
            order.append(name)
            return seconds * count

        return timing.Case(run, units=6)

    values = timing.rates({"a": case("a", 0.5), "b": case("b", 2.0)}, rounds=3, seconds=8)
    assert values == {"a": [12.0] * 3, "b": [3.0] * 3}
    assert order[-12:] == ["a", "a", "b", "b"] * 3  # each warmed up before its turn


def test_the_units_of_the_step_and_the_roofline(clock, monkeypatch):
    devices, batch = jax.device_count(), TINY.config.train.batch_size
    record = roofline.run(TINY)
    assert record["images_per_second_all"] == [batch] * TINY.rounds  # one step a second
    assert record["matmul_gflop_per_second"] == pytest.approx(devices * 2 * 64**3 / 1e9)
    assert record["copy_gbyte_per_second"] == pytest.approx(devices * 2 * 2**16 / 1e9)
    flops, moved = roofline.training_cost(TINY.config, "float32")
    bounds = {"arithmetic": devices * 2 * 64**3 / flops, "memory": devices * 2 * 2**16 / moved}
    assert record["bound_images_per_second"] == pytest.approx(bounds)
    assert record["share_of_roofline"] == pytest.approx(batch / min(bounds.values()))
    monkeypatch.setattr(roofline, "run", lambda options: record)
    assert step.run(TINY)["milliseconds_per_step"] == 1000


def test_the_units_of_feeds_and_samples(clock):
    record = input.run(TINY)
    batch = TINY.config.train.batch_size
    chunks = {feed: batch * batches for feed, batches in record["batches_per_chunk"].items()}
    assert record["images_per_second"] == chunks  # one chunk a second
    assert sampling.run(TINY)["images_per_second"] == {"1": 1, "64": 64, "512": 512}


@pytest.mark.slow
def test_single_suite_stands_at_the_top(tmp_path):
    path = tmp_path / "new" / "sampling.json"
    flags = ("--config.data.resolution=32", "--config.model.filters=(8,16)", "--rounds=1", "--seconds=0.01")
    result = run_module("benchmarks.throughput", "--suite=sampling", f"--json={path}", *flags)
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert record["suites"]["sampling"]["images_per_second"] == record["images_per_second"]
    assert {"device", "cpu_cores", "versions", "commit"} <= set(record)
    assert_one_line_error(run_module("benchmarks.throughput", "--suite=nothing"), "nothing", "peers")


@pytest.mark.slow
def test_whole_runs_and_starts():
    options = dataclasses.replace(TINY, rounds=1)
    record = end_to_end.run(options)
    for feed in ("resident", "streamed"):
        assert record[f"{feed}_to_step"] > 0
        assert 0 <= record["outside_dispatches_share"][feed] <= 1
    record = compile.run(options)
    assert all(value > 0 for value in (*record["seconds"].values(), *record["seconds_to_first_step"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jpeg_178x218", "png_128x128"])
def test_prepare_beside_the_decoder(tmp_path, monkeypatch, name):
    kind = prepare.KINDS[name]._replace(files=12)
    source = prepare.write_files(tmp_path / "images", kind)
    with Image.open(min(source.iterdir())) as image:
        assert (image.format, image.size) == (kind.format, kind.size)
    monkeypatch.setattr(prepare, "decode_seconds", lambda files: 3.0)
    record = prepare.measure(dataclasses.replace(TINY, rounds=1), source, folder=tmp_path)
    assert record["images"] == 12
    assert record["images_per_second"] * record["seconds"] == pytest.approx(12)
    assert record["ratio_to_decoder"] == pytest.approx(record["seconds"] / 3.0 * prepare.available_cpus())


def test_suites_run_in_their_order_and_once(monkeypatch, capsys):
    with pytest.raises(UserError, match="nothing"):
        throughput.suite_names(["nothing"])
    assert throughput.suite_names(["step", "prepare", "step"]) == ("prepare", "step")
    assert set(throughput.suite_names(["all"])) == set(throughput.SUITES) - {"peers"}

    def fail(name: str) -> None:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(throughput.importlib, "import_module", fail)
    assert "torch" in throughput.run_suite("peers", TINY)["skipped"]
    assert "torch" in capsys.readouterr().err


def test_report_writes_and_notices_a_change(tmp_path, capsys):
    suites = {
        "step": {"images_per_second": 1234.5, "share_of_roofline": 0.5},
        "peers": {"what": "trainers", "median": {"torch eager": 20.0, "ours": 30.0}, "ratio_to_best_torch": 1.5},
    }
    records = {"a": {"suites": suites, "device": "1 x cpu"}, "b": {"suites": {"peers": {"skipped": "no"}}}}
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for name, record in records.items():
        (tmp_path / report.RESULTS / f"throughput_{name}.json").write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    document, readme = (tmp_path / name for name in (report.DOCUMENT, report.README))
    for path in (document, readme):
        path.write_text("before\n<!-- throughput:begin -->\n<!-- throughput:end -->\nafter\n")
    assert report.report(tmp_path, check=True) == 1
    assert str(document) in capsys.readouterr().err
    assert report.report(tmp_path, check=False) == report.report(tmp_path, check=True) == 0
    for path in (document, readme):
        lines = path.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "| torch eager | 20 | 1.50 |" in lines
    lines = document.read_text().splitlines()
    assert "| | a | b |" in lines
    assert "| share of the roofline | 50.0% | \N{EN DASH} |" in lines
    document.write_text("no markers\n")
    with pytest.raises(UserError, match=str(document)):
        report.report(tmp_path, check=True)


@pytest.mark.parametrize("number", range(len(editing.NAMES)))
def test_an_edit_that_does_what_was_meant_changes_its_attribute_by_one(number):
    truth = np.random.default_rng(0).normal(size=(9, len(editing.NAMES)))

    class Direction:  # of a model whose codes are the attributes
        attribute, score = editing.NAMES[number], 0.9

        @staticmethod
        def edit(code, alphas):
            return [code + alpha * np.eye(len(code))[number] for alpha in alphas]

    trained = type("Trained", (), {"decode": staticmethod(lambda codes: codes)})
    row = editing.measure(trained, lambda images: images, Direction, truth, truth)
    assert row["change"] == pytest.approx(1.0)
    assert row["largest_other"] == 0
    assert row["monotonic"]


@pytest.mark.parametrize("name", record_sweep.TABLES)
def test_the_documented_scores_are_those_that_were_measured(name):
    record = json.loads((REPOSITORY / f"benchmarks/results/{name}.json").read_text())
    lines = record_sweep.table(name, record["rows"])
    text = record_sweep.DOCUMENT.read_text()
    assert report.put_between_markers(record_sweep.DOCUMENT, name, lines) == text


def test_the_other_documented_figures_are_those_that_were_measured():
    assert report.report(REPOSITORY, check=True) == 0
    record = json.loads((REPOSITORY / "benchmarks/results/editing_drawn64.json").read_text())
    document = (REPOSITORY / "docs/generation.md").read_text()
    assert editing.table(record["rows"]["curve"], record["regressor_r2_on_reconstructions"]) in document
    for method, rows in record["rows"].items():
        held = [(row["monotonic"], row["change"] >= 0.7, row["largest_other"] < 0.2) for row in rows]
        counts = " | ".join(str(count) for count in (*map(sum, zip(*held, strict=True)), sum(map(all, held))))
        assert f"| `{method}` | {counts} |" in document
