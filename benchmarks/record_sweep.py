"""From a sweep, or from some runs, to one JSON file of their figures and to the table that the documentation shows.

python -m benchmarks.record_sweep --sweep=/tmp/sweep --output=benchmarks/results/sweep_choices.json --command="..."
python -m benchmarks.record_sweep --run="the lineage=/tmp/gdl" --run=ours=/tmp/ours --output=... --command="..."

A run is the workdir of a training, or what benchmarks.pythae_run wrote, after `python -m facevae_jax.evaluate`.

Run it on the machine, in the environment and at the commit of the sweep, before facevae_jax/ or configs/ change. The
table goes into docs/evaluation.md between <!-- NAME:begin --> and <!-- NAME:end -->; tests/test_benchmarks.py compares.
"""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from benchmarks.environment import REPOSITORY, environment
from benchmarks.report import MISSING, look_up
from facevae_jax import command_line
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer, write_json
from facevae_jax.training.telemetry import read_metrics
from facevae_jax.training.workdir import CONFIG_FILE

DOCUMENT = REPOSITORY / "docs" / "evaluation.md"


class Column(NamedTuple):
    """What a table shows of each row."""

    heading: str
    path: str  # in the row, with dots
    form: str


SHARED = (
    Column("MSE", "scores.reconstruction.mse", ".5f"),
    Column("SSIM", "scores.reconstruction.ssim", ".3f"),
    Column("KL, nats", "scores.likelihood.rate", ",.0f"),
)
ELBO = Column("−ELBO, nats", "scores.likelihood.negative_elbo_at_best_variance", ",.0f")  # noqa: RUF001
SAMPLES = Column("samples", "scores.features.sample_frechet", ".1f")
TABLES: dict[str, tuple[Column, ...]] = {
    "sweep_choices": (Column("parameters", "scores.parameters", ",d"), *SHARED, ELBO),
    "sweep_baselines": (
        *SHARED,
        SAMPLES,
        Column("halfway", "scores.features.interpolation_frechet", ".1f"),
        Column("way", "scores.features.interpolation_length", ".2f"),
        Column("jump", "scores.features.interpolation_largest_step", ".2f"),
    ),
    "sweep_same_time": (
        Column("parameters", "scores.parameters", ",d"),
        Column("epochs", "epochs", "d"),
        Column("training, s", "training_seconds", ",.0f"),
        *SHARED,
        ELBO,
        SAMPLES,
    ),
}


def cell(row: Any, column: Column) -> str:
    """A figure, or a dash where there is none."""
    value = look_up(row, column.path)
    return MISSING if value is None else format(value, column.form)


def markdown(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table of a record."""
    columns = TABLES[name]
    lines = [f"| | {' | '.join(column.heading for column in columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {row['name']} | {' | '.join(cell(row, column) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def with_table(text: str, name: str, table: str) -> str:
    """A document's text with a table between its markers.

    Raises:
      UserError: the markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{DOCUMENT} needs the lines {begin.strip()} and {end.strip()}, in this order.")
    return before + begin + table + end + after


def training_of(workdir: pathlib.Path) -> dict[str, Any]:
    """What a run says of itself: its epochs, its speed, and its settings without paths of one machine.

    The seconds are those of training steps at the speed that a quarter of the log's lines reach: without compilation,
    evaluation, the time between a stop and going on, and other work on the machine, which slows many lines.
    """
    elsewhere = workdir / "training.json"
    if elsewhere.exists():
        return json.loads(elsewhere.read_text())
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    config = json.loads((workdir / CONFIG_FILE).read_text())
    for key in ("data_dir", "cache_dir"):
        config["data"].pop(key, None)
    found: dict[str, Any] = {"config": config}
    if len(lines) > 1:
        rate = statistics.quantiles((line["images_per_second"] for line in lines), n=4)[2]
        images = config["train"]["batch_size"] * lines[-1]["step"]
        found |= {"images_per_second": rate, "training_seconds": images / rate, "epochs": config["train"]["epochs"]}
    return found


def sweep_rows(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """What sweeps scored, named by the settings that are not the same in all rows; what failed is left out."""
    found = [(folder, row) for folder in folders for row in json.loads((folder / "sweep.json").read_text())]
    found = [(folder, row) for folder, row in found if "scores" in row]
    settings = [set(row["settings"].items()) for _, row in found]
    shared = set.intersection(*settings) if len(settings) > 1 else set()

    def name(row: dict[str, Any]) -> str:
        own = (item for item in row["settings"].items() if item not in shared)
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in own)

    return [
        {
            "name": name(row),
            **{key: value for key, value in row.items() if key != "folder"},
            **training_of(folder / row["folder"]),
        }
        for folder, row in found
    ]


def run_row(name: str, workdir: str) -> dict[str, Any]:
    """A run's training, and its scores on validation."""
    scores = json.loads((pathlib.Path(workdir) / "evaluation_validation.json").read_text())
    return {"name": name, "scores": scores, **training_of(pathlib.Path(workdir))}


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_multi_string("sweep", [], "--output of launch/sweep.py")
    flags.DEFINE_multi_string("run", [], "NAME=WORKDIR of a run that was evaluated")
    flags.DEFINE_string("output", None, "JSON file to write", required=True)
    flags.DEFINE_string("command", None, "of the sweep", required=True)


def main(arguments: list[str]) -> None:
    """Writes the record and puts its table into the document."""
    del arguments
    values, output = flags.FLAGS, pathlib.Path(flags.FLAGS.output)
    if output.stem not in TABLES:
        raise UserError(
            f"--output={values.output!r} must be named {', '.join(TABLES)}.json: there are tables of these."
        )
    try:
        rows = sweep_rows([pathlib.Path(sweep) for sweep in values.sweep])
        rows += [run_row(*run.partition("=")[::2]) for run in values.run]
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): has it been run and evaluated?"
        ) from error
    text = with_table(DOCUMENT.read_text(), output.stem, markdown(output.stem, rows))
    write_json(output, {"command": values.command, "rows": rows, **environment()})
    with atomic_writer(DOCUMENT) as file:
        file.write(text.encode())


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
