"""The paper's lineage beside its public record, and how far its training is from its evaluation.

python -m facevae_jax.main --config=configs/gdl128.py --config.data.name=celeba --workdir=/tmp/gdl128
python -m benchmarks.lineage --workdir=/tmp/gdl128 --json=benchmarks/results/lineage_gdl128.json --chart=docs/gdl128.svg

The total is the loss of the lineage's code: r_loss_factor x mean squared error of one draw's reconstruction + KL, mean
over images. In training it is that of batches with dropout, as they came in each epoch.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.environment import environment
from facevae_jax import command_line, startup
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer, write_json
from facevae_jax.generation.loading import folder_of, load, restore
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.metrics import recalibration, scores
from facevae_jax.reporting.charts import COLOURS, FAINT, drawing, legend_below
from facevae_jax.training.telemetry import read_metrics
from facevae_jax.training.workdir import CONFIG_FILE

SPLITS = ("train", "validation")
# Of a network that was trained by this code on all of CelebA at 128x128: batch 32, r_loss_factor 10,000.
PUBLIC_TOTALS = {1: 234.1, 29: 219.0}  # by the number of epochs
TERMS = {"loss": "total", "reconstruction": "reconstruction", "kl": "KL"}


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_string("workdir", None, "Of a finished run of configs/gdl128.py.")
    flags.DEFINE_string("json", None, "file to write")
    flags.DEFINE_string("chart", None, "SVG to write")


def by_epoch(lines: Sequence[dict[str, Any]], kind: str, *, steps_per_epoch: float) -> list[dict[str, float]]:
    """The terms after each epoch that has a line: in training, means of the lines that end in it."""
    epochs: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == kind:
            epochs.setdefault(int(np.ceil(line["step"] / steps_per_epoch)), []).append(line)
    return [
        {"epoch": epoch, **{name: float(np.mean([line[key] for line in found])) for key, name in TERMS.items()}}
        for epoch, found in epochs.items()
    ]


def evaluated(trained: TrainedVAE, split: str) -> dict[str, float]:
    """The terms of a split as an evaluation has them."""
    record = scores.evaluate(trained, split, draws=())
    nats = record["likelihood"]
    reconstruction = trained.config.objective.r_loss_factor * nats["best_variance"]
    return {"total": reconstruction + nats["rate"], "reconstruction": reconstruction, "KL": nats["rate"]}


def table(record: dict[str, Any]) -> str:
    """The totals of a record, as the documentation shows them."""
    found, last = record["evaluated"], record["curves"]["train"][-1]["total"]
    rows = [("in training, last epoch: the batch's statistics, dropout", format(last, ".1f"), "–")]  # noqa: RUF001
    for name, of in (
        ("in evaluation: running statistics of momentum 0.99", found["running"]),
        ("the same with `--recalibrate`", found["recalibrated"]),
    ):
        rows.append((name, *(format(of[split]["total"], ".1f") for split in SPLITS)))
    lines = ["| | training images | validation |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def chart(curves: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    """The terms by epoch: lines are training, dots validation, crosses the public record of the total."""
    with drawing():
        figure = Figure()
        axes = figure.add_subplot(xlabel="epoch", ylabel="r_loss_factor x MSE, and nats")
        for colour, name in zip(COLOURS, TERMS.values(), strict=False):
            for rows, style in zip(curves.values(), ({}, {"linestyle": "", "marker": "o"}), strict=True):
                axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], color=colour, **style)
        axes.plot(PUBLIC_TOTALS.keys(), PUBLIC_TOTALS.values(), color=FAINT, linestyle="", marker="x")
        axes.set_ylim(0, 300)  # the first epoch goes on from several times that
        handles = [Line2D([], [], color=colour) for colour in COLOURS[: len(TERMS)]]
        handles.append(Line2D([], [], color=FAINT, linestyle="", marker="x"))
        legend_below(figure, handles, [*TERMS.values(), "public total"])
        with atomic_writer(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main(arguments: list[str]) -> None:
    """Reads the run, evaluates both splits with both statistics."""
    del arguments
    values = flags.FLAGS
    if not values.workdir:
        raise UserError("--workdir is missing: give a run of configs/gdl128.py.")
    startup.keep_compiled_programs()
    workdir = pathlib.Path(values.workdir)
    restored, lines = restore(workdir), read_metrics(workdir)
    models = {
        "running": load(workdir),
        "recalibrated": recalibration.recalibrated(restored, folder_of(workdir)),
    }
    gap = {name: {split: evaluated(model, split) for split in SPLITS} for name, model in models.items()}
    steps_per_epoch = max(line["step"] for line in lines) / restored.config.train.epochs
    kinds = {"train": "train", "validation": "evaluation"}
    curves = {name: by_epoch(lines, kind, steps_per_epoch=steps_per_epoch) for name, kind in kinds.items()}
    config = json.loads((workdir / CONFIG_FILE).read_text())
    config["data"].pop("data_dir", None)  # a path of one machine
    record = {
        "what": __doc__,
        "public_totals": PUBLIC_TOTALS,
        "curves": curves,
        "evaluated": gap,
        "config": config,
        **environment(),
    }
    print(json.dumps({"last epoch": {name: rows[-1] for name, rows in curves.items()}, "evaluated": gap}, indent=2))
    if values.json:
        write_json(values.json, record)
    if values.chart:
        chart(curves, pathlib.Path(values.chart))


if __name__ == "__main__":
    define_flags()
    startup.use_huge_pages()
    command_line.run(main)
