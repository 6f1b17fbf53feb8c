"""The benchmarks at a tiny size: their units, by a clock of the tests, and that documents show what was recorded."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from benchmarks import accelerator, editing, report
from benchmarks.suites import compile, end_to_end, input, sampling, step, timing, training
from facevae_jax.config import DataConfig, RunConfig, TrainConfig
from facevae_jax.core.errors import UserError
from facevae_jax.models import vae
from tests.conftest import REPOSITORY, assert_one_line_error, run_module

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


@pytest.mark.slow
def test_the_units_of_steps_feeds_and_samples(monkeypatch):
    for module in (input, timing, training):  # a second passes between two looks at the clock
        ticks = itertools.count(0.0)
        monkeypatch.setattr(module, "time", type("Clock", (), {"perf_counter": staticmethod(ticks.__next__)}))
    record = step.run(TINY)
    assert record["images_per_second_all"] == [TINY.config.train.batch_size] * TINY.rounds  # one step a second
    assert record["milliseconds_per_step"] == 1000
    record = input.run(TINY)
    batch = TINY.config.train.batch_size
    chunks = {feed: batch * batches for feed, batches in record["batches_per_chunk"].items()}
    assert record["images_per_second"] == chunks  # one chunk a second
    assert sampling.run(TINY)["images_per_second"] == {"1": 1, "64": 64, "512": 512}


@pytest.mark.slow
def test_suites_run_in_their_order_and_once(tmp_path):
    path = tmp_path / "new" / "suites.json"
    flags = ("--config.data.resolution=32", "--config.model.filters=(8,16)", "--rounds=1", "--seconds=0.01")
    result = run_module("benchmarks.throughput", "--suite=sampling,step,sampling", f"--json={path}", *flags)
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert list(record["suites"]) == ["step", "sampling"]
    assert {"device", "cpu_cores", "versions", "commit"} <= set(record)
    assert_one_line_error(run_module("benchmarks.throughput", "--suite=step,nothing"), "nothing", "peers")


@pytest.mark.slow
def test_an_accelerator_s_minutes_end_in_time_and_name_what_is_missing(tmp_path):
    path = tmp_path / "record.json"
    flags = ("--configs=quickstart", "--settings=data.resolution=32,train.batch_size=8", "--rounds=1", "--seconds=0.01")
    started = time.monotonic()
    result = run_module("benchmarks.accelerator", *flags, "--topology=v5e-5", "--minutes=1", f"--json={path}")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 120
    record = json.loads(path.read_text())
    assert record["parts"]["step quickstart"]["images_per_second"] > 0
    assert "v5e-4" in record["missing"]["plan quickstart"]
    assert set(record["parts"]) | set(record["missing"]) == {
        "step quickstart",
        "plan quickstart",
        "end_to_end quickstart",
        "peers",
    }
    assert {"device", "versions", "commit"} <= set(record)
    with pytest.raises(UserError, match="did not end in 1 s"):
        accelerator.output_of(["benchmarks.throughput", "--suite=peers", f"--json={path}"], seconds=1.0)


@pytest.mark.slow
def test_whole_runs_and_starts():
    options = dataclasses.replace(TINY, rounds=1)
    record = end_to_end.run(options)
    for feed in ("resident", "streamed"):
        assert record[f"{feed}_to_step"] > 0
        assert 0 <= record["outside_dispatches_share"][feed] <= 1
    record = compile.run(options)
    assert all(value > 0 for value in (*record["seconds"].values(), *record["seconds_to_first_step"].values()))


def test_report_writes_and_notices_a_change(tmp_path, capsys):
    peers = {"what": "trainers", "median": {"torch eager": 20.0, "ours": 30.0}}
    sweep = [{"name": "a run", "scores": {"parameters": 1234, "reconstruction": {"mse": 0.5}}}]
    records = {
        "throughput_a": {"suites": {"step": {"images_per_second": 1234.5}}},
        "throughput_b": {"suites": {"peers": peers}, "device": "1 x cpu", "cpu_cores": 2, "cpu": "a processor"},
        "sweep_choices": {"rows": sweep},
    }
    markers = {report.DOCUMENT: "throughput", report.README: "throughput", report.EVALUATION: "sweep_choices"}
    for folder in (report.RESULTS, "docs"):
        (tmp_path / folder).mkdir(parents=True)
    for name, record in records.items():
        (tmp_path / report.RESULTS / f"{name}.json").write_text(json.dumps(record))
    for document, name in markers.items():
        (tmp_path / document).write_text(f"before\n<!-- {name}:begin -->\n<!-- {name}:end -->\nafter\n")
    assert report.report(tmp_path, check=True) == 1
    warned = capsys.readouterr().err
    assert all(document in warned for document in markers)
    assert report.report(tmp_path, check=False) == report.report(tmp_path, check=True) == 0
    lines = {document: (tmp_path / document).read_text().splitlines() for document in markers}
    assert all((found[0], found[-1]) == ("before", "after") for found in lines.values())
    assert "| torch eager | 20 | 1.50 |" in lines[report.README]
    assert {"| | a | b |", "| training steps alone, images/s | 1,234 | – |"} <= set(lines[report.DOCUMENT])  # noqa: RUF001
    assert "| a run | 1,234 | 0.50000 | – | – | – |" in lines[report.EVALUATION]  # noqa: RUF001
    (tmp_path / report.README).write_text("no markers\n")
    with pytest.raises(UserError, match="throughput:begin"):
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


def test_the_documented_figures_are_those_that_were_measured():
    assert report.report(REPOSITORY, check=True) == 0
    record = json.loads((REPOSITORY / "benchmarks/results/editing_drawn64.json").read_text())
    document = (REPOSITORY / "docs/generation.md").read_text()
    assert editing.table(record["rows"]["curve"], record["regressor_r2_on_reconstructions"]) in document
    for method, rows in record["rows"].items():
        held = [(row["monotonic"], row["change"] >= 0.7, row["largest_other"] < 0.2) for row in rows]
        counts = " | ".join(str(count) for count in (*map(sum, zip(*held, strict=True)), sum(map(all, held))))
        assert f"| `{method}` | {counts} |" in document


def test_the_arithmetic_of_a_step_is_that_of_its_products():
    filters, side, batch, latent = (64, 128), 64, 2, 16
    model = vae.Config(latent_dim=latent, filters=filters, head="transposed")
    train = TrainConfig(batch_size=batch, convolution="matmul")
    config = dataclasses.replace(TINY.config, data=DataConfig(resolution=side), model=model, train=train)
    first, second = 9 * 3 * filters[0] * (side // 2) ** 2, 9 * filters[0] * filters[1] * (side // 4) ** 2
    codes = filters[1] * (side // 4) ** 2 * latent
    # Forward, and two gradients each; images have none. Twice, for multiplications and additions.
    expected = 2 * batch * (3 * (2 * first + 2 * second + 3 * codes) - first)
    assert expected < training.arithmetic(config) < 1.1 * expected
    parts = dataclasses.replace(config, train=dataclasses.replace(train, accumulation=2))
    assert training.arithmetic(parts) == training.arithmetic(config)
