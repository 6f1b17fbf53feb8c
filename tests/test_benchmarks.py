"""The measurements run at a tiny size and report what they promise; no figure of this machine is judged."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from benchmarks import editing, evaluation_cost, lineage, record_sweep, report, throughput
from benchmarks.suites import cost, end_to_end, growth, input, prepare, roofline, sampling, step
from benchmarks.suites.options import Options, Skipped
from configs import gdl128, quickstart
from facevae_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from facevae_jax.metrics import scores
from facevae_jax.models.vae import VAE, Execution, forward_flops
from tests.conftest import REPOSITORY, assert_one_line_error, run_module
from tests.explored import random_model

PAPER = RunConfig.from_config_dict(gdl128.get_config())
TINY = Options(
    config=RunConfig(
        data=DataConfig(resolution=32),
        model=ModelConfig(latent_dim=4, filters=(8, 16)),
        train=TrainConfig(batch_size=8, steps_per_dispatch=4, convolution="plain"),  # compiles soonest
    ),
    rounds=2,
    seconds=0.01,
    images=64,
)


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(roofline, "MATMUL_SIDE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)


def figures(record: Any) -> list[float]:
    """All numbers of a record."""
    if isinstance(record, dict):
        return [number for value in record.values() for number in figures(value)]
    if isinstance(record, list):
        return [number for value in record for number in figures(value)]
    return [record] if isinstance(record, (int, float)) else []


def test_flops_by_hand():
    config = dataclasses.replace(TINY.config, model=ModelConfig(latent_dim=4, filters=(8, 16), kernel_size=3))
    convolutions = 9 * 3 * 8 * 16**2 + 9 * 8 * 16 * 8**2  # the decoder's are the same with the ends swapped
    dense = 3 * (8 * 8 * 16) * 4  # mean, log variance, and back
    forward = forward_flops(config.model, config.data.resolution)
    assert forward == 2 * (2 * convolutions + dense)
    assert cost.training_flops_per_image(config) == 3 * forward


def test_flops_agree_with_xla():
    # Of one image and without normalisation, which the formula leaves out; XLA counts no multiplication by padding.
    config = dataclasses.replace(PAPER, model=dataclasses.replace(PAPER.model, normalization="none", activation="relu"))
    model = VAE(config.model, config.data.resolution, Execution("plain"))
    image = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    key, noise = jax.random.key(0), jnp.zeros((1, config.model.latent_dim))
    variables = jax.eval_shape(lambda image: model.init(key, image, noise, train=False), image)
    lowered = jax.jit(lambda variables, image: model.apply(variables, image, noise, train=False)).lower(
        variables, image
    )
    counted = lowered.cost_analysis()["flops"]
    assert forward_flops(config.model, config.data.resolution) == pytest.approx(counted, rel=0.05)


def test_bytes_by_hand():
    outputs = 8 * 16**2 + 16 * 8**2 + 4 + 4 + 16 * 8**2 + 8 * 16**2 + 3 * 32**2
    weights = 2 * (9 * 3 * 8 + 9 * 8 * 16) + 3 * (8 * 8 * 16) * 4
    expected = 5 * 4 * outputs + 3 * 3 * 32**2 + 10 * 4 * weights / 8
    assert cost.training_bytes_per_image(TINY.config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("suite", "cases"),
    [(step, None), (roofline, None), (input, {"resident", "streamed"}), (sampling, {"1", "64", "512"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_suite_gives_positive_rates(suite, cases, small_machine):
    record = suite.run(TINY)
    assert isinstance(record["what"], str)
    assert all(math.isfinite(number) and number > 0 for number in figures(record))
    rates, repeated = record["images_per_second"], record["images_per_second_all"]
    if cases is None:
        assert isinstance(rates, float)
        assert len(repeated) == TINY.rounds
    else:
        assert set(rates) == set(repeated) == cases
        assert all(len(values) == TINY.rounds for values in repeated.values())
    json.dumps(record, allow_nan=False)


def test_growth_leaves_out_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(growth, "BATCH_SIZES", (1, 8))
    monkeypatch.setattr(growth, "RESOLUTIONS", (32,))
    monkeypatch.setattr(growth, "LATENT_DIMS", (4,))
    monkeypatch.setattr(growth, "PIXELS_IN_BATCH", 8 * 32**2)
    record = growth.run(TINY)
    for series, xs in {"batch_size": [8], "resolution": [32], "latent_dim": [4]}.items():
        assert [point["x"] for point in record[series]] == xs
        assert all(point["images_per_second"] > 0 for point in record[series])
    assert list(record["left_out"]["batch_size"]) == ["1"]


def test_unknown_suite_is_one_line():
    assert_one_line_error(run_module("benchmarks.throughput", "--suite=nothing"), "nothing", "growth", "peers")


def test_single_suite_stands_at_the_top(tmp_path):
    path = tmp_path / "new" / "sampling.json"
    flags = ("--config.data.resolution=32", "--config.model.filters=(8,16)", "--rounds=1", "--seconds=0.01")
    result = run_module("benchmarks.throughput", "--suite=sampling", f"--json={path}", *flags)
    assert result.returncode == 0, result.stderr
    assert "sampling" in result.stdout
    record = json.loads(path.read_text())
    assert record["suites"]["sampling"]["images_per_second"] == record["images_per_second"]
    assert {"device", "cpu_cores", "versions", "commit"} <= set(record)


@pytest.mark.slow
def test_whole_runs_beside_the_step():
    record = end_to_end.run(dataclasses.replace(TINY, rounds=1))
    for feed in ("resident", "streamed"):
        assert record[f"{feed}_to_step"] > 0
        assert len(record[f"{feed}_to_step_all"]) == 1
        assert 0 <= record["outside_dispatches_share"][feed] <= 1


def test_prepare_needs_its_packages(monkeypatch):
    monkeypatch.setattr(prepare, "NEEDED", ("no_such_package",))
    with pytest.raises(Skipped, match="no_such_package"):
        prepare.run(TINY)


@pytest.mark.parametrize("name", ["jpeg_178x218", "png_128x128"])
def test_files_for_prepare_are_images(tmp_path, name):
    kind = prepare.KINDS[name]._replace(files=3)
    files = sorted(prepare.write_files(tmp_path / name, kind).iterdir())
    assert len(files) == 3
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == (kind.format, kind.size)
    assert prepare.decode_seconds(files) > 0


def test_suites_run_in_their_order_and_once():
    assert throughput.suite_names(["step", "prepare", "step"]) == ("prepare", "step")
    assert set(throughput.suite_names(["all"])) == set(throughput.SUITES) - {"peers"}


def test_missing_package_skips_the_suite(monkeypatch, capsys):
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(throughput.importlib, "import_module", fail)
    assert throughput.run_suite("peers", TINY) == {"skipped": "needs the package torch"}
    assert capsys.readouterr().err == "peers: skipped: needs the package torch\n"


@pytest.fixture
def repository(tmp_path):
    """Results of two machines, and documents without figures."""
    points = [{"x": 1, "images_per_second": 10.0}, {"x": 4, "images_per_second": 30.0}]
    suites = {
        "step": {"images_per_second": 1234.5, "share_of_roofline": 0.5},
        "growth": {"batch_size": points, "resolution": points, "latent_dim": points},
        "peers": {"what": "trainers", "median": {"torch eager": 20.0, "ours": 30.0}, "ratio_to_best_torch": 1.5},
    }
    records = {"a": {"suites": suites, "device": "1 x cpu"}, "b": {"suites": {"growth": {"skipped": "no"}}}}
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for name, record in records.items():
        (tmp_path / report.RESULTS / f"throughput_{name}.json").write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    for name in (report.DOCUMENT, report.README):
        (tmp_path / name).write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    return tmp_path


def test_report_writes_and_notices_a_change(repository):
    pytest.importorskip("matplotlib")
    document, readme, plot = (repository / name for name in (report.DOCUMENT, report.README, "docs/throughput_a.png"))
    assert report.report(repository, check=True) == [document, readme, plot]
    assert not plot.exists()
    report.report(repository, check=False)
    for path in (document, readme):
        text = path.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"\n{report.END}\nafter\n")
        assert "| torch eager | 20 | 1.50 |" in text.splitlines()
    lines = document.read_text().splitlines()
    assert "| | a | b |" in lines
    assert "| share of the roofline | 50.0% | \N{EN DASH} |" in lines
    assert report.report(repository, check=True) == []

    result = repository / report.RESULTS / "throughput_a.json"
    result.write_text(result.read_text().replace("30.0", "31.0"))
    assert report.report(repository, check=True) == [document, readme, plot]


def test_report_check_is_an_exit_code(repository):
    result = run_module("benchmarks.report", f"--root={repository}", "--check")
    assert result.returncode == 1
    assert "run python -m benchmarks.report" in result.stderr
    (repository / report.DOCUMENT).write_text("no markers\n")
    assert_one_line_error(run_module("benchmarks.report", f"--root={repository}", "--check"), report.BEGIN)


def test_the_cost_of_an_evaluation(monkeypatch):
    monkeypatch.setattr(scores, "DRAWS", (1, 4))
    record = evaluation_cost.measure(quickstart, images=9, rounds=2)
    assert len(record["ratios"]) == 2
    assert record["ratio"] > 0
    assert all(len(taken) == 2 for taken in record["seconds"].values())


def test_training_lines_are_those_of_the_epoch_that_they_end_in():
    def line(step: int, loss: float, kind: str = "train") -> dict[str, Any]:
        return {"kind": kind, "step": step, "loss": loss, "reconstruction": loss - 1, "kl": 1.0}

    lines = [line(50, 10), line(100, 8), line(106, 7, "evaluation"), line(106, 6), line(150, 5), line(212, 3)]
    assert lineage.by_epoch(lines, "train", steps_per_epoch=106) == [
        {"epoch": 1, "total": 8.0, "reconstruction": 7.0, "KL": 1.0},
        {"epoch": 2, "total": 4.0, "reconstruction": 3.0, "KL": 1.0},
    ]
    assert [row["total"] for row in lineage.by_epoch(lines, "evaluation", steps_per_epoch=106)] == [7.0]


def test_the_lineages_total_is_the_loss_of_one_draw(tiny_config, tmp_path):
    trained = random_model(tiny_config, tmp_path)
    terms = lineage.evaluated(trained, "validation")
    nats = scores.evaluate(trained, "validation", draws=())["likelihood"]
    # Its objective's variance makes r_loss_factor x MSE out of a Gaussian's squared error (Rybkin et al. 2021).
    size = 3 * trained.resolution**2
    constant = 0.5 * size * math.log(2 * math.pi * nats["variance"])
    assert terms["total"] == pytest.approx(nats["negative_elbo"] - constant, rel=1e-4)
    assert terms["total"] == terms["reconstruction"] + terms["KL"]


@pytest.mark.parametrize("name", record_sweep.TABLES)
def test_the_documented_scores_are_those_that_were_measured(name):
    record = json.loads((REPOSITORY / f"benchmarks/results/{name}.json").read_text())
    text = record_sweep.DOCUMENT.read_text()
    assert record_sweep.with_table(text, name, record_sweep.markdown(name, record["rows"])) == text
    assert record["command"] in text


def test_the_documented_lineage_is_what_was_measured():
    record = json.loads((REPOSITORY / "benchmarks/results/lineage_gdl128.json").read_text())
    assert lineage.table(record) in record_sweep.DOCUMENT.read_text()


def test_the_documented_edits_are_those_that_were_measured():
    record = json.loads((REPOSITORY / "benchmarks/results/editing_drawn64.json").read_text())
    document = (REPOSITORY / "docs/generation.md").read_text()
    assert editing.table(record["rows"]["curve"], record["regressor_r2_on_reconstructions"]) in document
    for method, rows in record["rows"].items():
        held = [(row["monotonic"], row["change"] >= 0.7, row["largest_other"] < 0.2) for row in rows]
        counts = " | ".join(str(count) for count in (*map(sum, zip(*held, strict=True)), sum(map(all, held))))
        assert f"| `{method}` | {counts} |" in document
