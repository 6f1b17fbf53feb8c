"""The paper's lineage beside its published loss, and the gap between its training and its evaluation.

python -m facevae_jax.main --config=configs/gdl128.py --config.data.name=celeba --workdir=/tmp/gdl128
python -m benchmarks.lineage --workdir=/tmp/gdl128 --json=benchmarks/results/lineage_gdl128.json --chart=docs/gdl128.svg

The total is the loss of the lineage's code: r_loss_factor x mean squared error of one draw's reconstruction + KL, mean
over images. The training loss is that of the batches of each epoch, with dropout.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.environment import environment, without_paths
from benchmarks.report import MISSING, markdown
from facevae_jax.core import command_line, startup
from facevae_jax.core.files import atomic_writer, write_json
from facevae_jax.metrics import recalibration, scores
from facevae_jax.reporting.page import COLORS, FAINT, drawing, legend_below
from facevae_jax.trained.loading import restore
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training.setup import make_mesh
from facevae_jax.training.telemetry import read_metrics

SPLITS = ("train", "validation")
# Of the lineage's code on all of CelebA at 128x128: batch 32, r_loss_factor 10,000.
PUBLIC_TOTALS = {1: 234.1, 29: 219.0}  # by the number of epochs
TERMS = {"loss": "total", "reconstruction": "reconstruction", "kl": "KL"}


def by_epoch(lines: Sequence[dict[str, Any]], kind: str, *, steps_per_epoch: float) -> list[dict[str, float]]:
    """The terms of each epoch that has log lines: means of the lines whose last step is in it."""
    epochs: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == kind:
            epochs.setdefault(int(np.ceil(line["step"] / steps_per_epoch)), []).append(line)
    return [
        {"epoch": epoch, **{name: float(np.mean([line[key] for line in found])) for key, name in TERMS.items()}}
        for epoch, found in epochs.items()
    ]


def evaluated(trained: TrainedModel, split: str) -> dict[str, float]:
    """The terms of a split in evaluation."""
    nats = scores.evaluate(trained, split, draws=())["likelihood"]
    reconstruction = trained.config.objective.r_loss_factor * nats["best_variance"]
    return {"total": reconstruction + nats["rate"], "reconstruction": reconstruction, "KL": nats["rate"]}


def table(record: dict[str, Any]) -> str:
    """The table of the totals for the documentation."""
    found, last = record["evaluated"], record["curves"]["train"][-1]["total"]
    rows = [("in training, last epoch: the batch's statistics, dropout", f"{last:.1f}", MISSING)]
    for name, of in (
        ("in evaluation: running statistics of momentum 0.99", found["running"]),
        ("the same with `--recalibrate`", found["recalibrated"]),
    ):
        rows.append((name, *(f"{of[split]['total']:.1f}" for split in SPLITS)))
    return "\n".join(markdown(("", "training images", "validation"), rows))


def chart(curves: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    """Plots the terms by epoch: lines are training, dots validation, crosses the published total."""
    with drawing():
        figure = Figure()
        axes = figure.add_subplot(xlabel="epoch", ylabel="r_loss_factor x MSE, and nats")
        for color, name in zip(COLORS, TERMS.values(), strict=False):
            for rows, style in zip(curves.values(), ({}, {"linestyle": "", "marker": "o"}), strict=True):
                axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], color=color, **style)
        axes.plot(PUBLIC_TOTALS.keys(), PUBLIC_TOTALS.values(), color=FAINT, linestyle="", marker="x")
        axes.set_ylim(0, 300)  # the first epoch starts at several times that
        handles = [Line2D([], [], color=color) for color in COLORS[: len(TERMS)]]
        handles.append(Line2D([], [], color=FAINT, linestyle="", marker="x"))
        legend_below(figure, handles, [*TERMS.values(), "public total"])
        with atomic_writer(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main(arguments: list[str]) -> None:
    """Reads the run and evaluates both splits with both batch statistics."""
    del arguments
    values = flags.FLAGS
    startup.keep_compiled_programs()
    workdir = pathlib.Path(values.workdir)
    mesh = make_mesh()
    restored, lines = restore(workdir, mesh), read_metrics(workdir)
    models = {"running": restored, "recalibrated": recalibration.recalibrated(restored)}
    gap = {
        name: {split: evaluated(TrainedModel(model, folder=workdir, mesh=mesh), split) for split in SPLITS}
        for name, model in models.items()
    }
    steps_per_epoch = max(line["step"] for line in lines) / restored.config.train.epochs
    kinds = {"train": "train", "validation": "evaluation"}
    curves = {name: by_epoch(lines, kind, steps_per_epoch=steps_per_epoch) for name, kind in kinds.items()}
    print(json.dumps({"last epoch": {name: rows[-1] for name, rows in curves.items()}, "evaluated": gap}, indent=2))
    if values.json:
        config = without_paths(restored.config.to_dict())
        record = {"public_totals": PUBLIC_TOTALS, "curves": curves, "evaluated": gap, "config": config}
        write_json(values.json, {"what": __doc__, **record, **environment()})
    if values.chart:
        chart(curves, pathlib.Path(values.chart))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of a finished run of configs/gdl128.py.", required=True)
    flags.DEFINE_string("json", None, "file to write")
    flags.DEFINE_string("chart", None, "SVG to write")
    startup.use_huge_pages()
    command_line.run(main)
