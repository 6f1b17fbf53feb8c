"""Writes the figures of a sweep, or of some runs, into one JSON file, for `python -m benchmarks.report`.

python -m benchmarks.record_sweep --sweep=/tmp/sweep --output=benchmarks/results/sweep_choices.json --command="..."
python -m benchmarks.record_sweep --run="the lineage=/tmp/gdl" --run=ours=/tmp/ours --output=... --command="..."
python -m benchmarks.record_sweep --run=celeba64=/tmp/run --output=benchmarks/results/celeba64_cpu.json --command="..."

A run is the workdir of a training, or the output of benchmarks.pythae_run, after `python -m facevae_jax.evaluate`.

Run it on the machine, in the environment and at the commit of the sweep, before facevae_jax/ or configs/ change.
"""

import json
import pathlib
import statistics
from typing import Any

from absl import flags

from benchmarks.environment import environment, without_paths
from facevae_jax.core import command_line
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import write_json
from facevae_jax.training.telemetry import read_metrics
from facevae_jax.training.workdir import CONFIG_FILE


def training_of(workdir: pathlib.Path) -> dict[str, Any]:
    """A run's epochs, speed and settings, without paths of one machine.

    The seconds are those of training steps at the upper quartile of the logged speeds: without compilation,
    evaluation, interruptions, and other work on the machine, which slows many lines.
    """
    if (workdir / "training.json").exists():  # of benchmarks.pythae_run
        return json.loads((workdir / "training.json").read_text())
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    config = without_paths(json.loads((workdir / CONFIG_FILE).read_text()))
    found: dict[str, Any] = {"config": config}
    if len(lines) > 1:
        rate = statistics.quantiles((line["images_per_second"] for line in lines), n=4)[2]
        images = config["train"]["batch_size"] * lines[-1]["step"]
        found |= {"images_per_second": rate, "training_seconds": images / rate, "epochs": config["train"]["epochs"]}
    return found


def sweep_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a sweep, each named by the settings that differ between rows; failed ones are left out."""
    rows = [row for row in json.loads((folder / "sweep.json").read_text()) if "scores" in row]
    settings = [set(row["settings"].items()) for row in rows]
    shared = set.intersection(*settings) if len(settings) > 1 else set()

    def name(row: dict[str, Any]) -> str:
        own = (item for item in row["settings"].items() if item not in shared)
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in own)

    return [{"name": name(row), **row, **training_of(folder / row.pop("folder"))} for row in rows]


def main(arguments: list[str]) -> None:
    """Writes the record."""
    del arguments
    values = flags.FLAGS
    try:
        rows = [row for sweep in values.sweep for row in sweep_rows(pathlib.Path(sweep))]
        for name, _, workdir in (run.partition("=") for run in values.run):
            scores = json.loads(pathlib.Path(workdir, "evaluation_validation.json").read_text())
            rows.append({"name": name, "scores": scores, **training_of(pathlib.Path(workdir))})
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: run and evaluate it first.") from error
    write_json(values.output, {"command": values.command, "rows": rows, **environment()})


if __name__ == "__main__":
    flags.DEFINE_multi_string("sweep", [], "--output of launch/sweep.py")
    flags.DEFINE_multi_string("run", [], "NAME=WORKDIR of a run that was evaluated")
    flags.DEFINE_string("output", None, "JSON file to write", required=True)
    flags.DEFINE_string("command", None, "of the sweep", required=True)
    command_line.run(main)
