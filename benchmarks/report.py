"""Writes the tables of benchmarks/results into README.md, docs/throughput.md and docs/evaluation.md.

python -m benchmarks.report            writes them; README.md gets the first comparison with other trainers
python -m benchmarks.report --check    writes nothing; the exit code is 1 if the documents differ from the JSON files
"""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.environment import REPOSITORY
from facevae_jax.core import command_line
from facevae_jax.core.errors import UserError

RESULTS, THROUGHPUT = "benchmarks/results", "throughput_"
DOCUMENT, README, EVALUATION = "docs/throughput.md", "README.md", "docs/evaluation.md"
MISSING = "–"  # noqa: RUF001 - a dash in an empty cell


def rate(value: float) -> str:
    """Three significant digits below 1000, whole numbers above."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


percent, ratio, seconds = "{:.1%}".format, "{:.2f}".format, "{:.1f}".format
# Lines of the table: label, dotted path in the JSON file, format.
ROWS = (
    ("device", "device", str),
    ("processor", "cpu", str),
    ("processor's cores", "cpu_cores", str),
    ("jax", "versions.jax", str),
    ("commit", "commit", lambda commit: f"`{commit[:8]}{'+' if commit.endswith('+') else ''}`"),
    ("resolution, pixels", "settings.config.data.resolution", str),
    ("batch", "settings.config.train.batch_size", str),
    ("dtype", "settings.config.model.dtype", str),
    ("training steps alone, images/s", "suites.step.images_per_second", rate),
    ("one step, ms", "suites.step.milliseconds_per_step", rate),
    ("its arithmetic a second to a product's of side 2048", "suites.step.share_of_product.2048", percent),
    ("its arithmetic a second to a product's of side 4096", "suites.step.share_of_product.4096", percent),
    ("whole run, resident, to the step alone", "suites.end_to_end.resident_to_step", ratio),
    ("whole run, streamed, to the step alone", "suites.end_to_end.streamed_to_step", ratio),
    ("time outside dispatches, resident", "suites.end_to_end.outside_dispatches_share.resident", percent),
    ("time outside dispatches, streamed", "suites.end_to_end.outside_dispatches_share.streamed", percent),
    ("feed alone, resident, images/s", "suites.input.images_per_second.resident", rate),
    ("feed alone, streamed, images/s", "suites.input.images_per_second.streamed", rate),
    *((f"decoding {n} latents, images/s", f"suites.sampling.images_per_second.{n}", rate) for n in (1, 64, 512)),
    ("tracing and lowering, s", "suites.compile.seconds.trace_and_lower", seconds),
    ("compiling, s", "suites.compile.seconds.compile", seconds),
    ("command to first step, nothing compiled, s", "suites.compile.seconds_to_first_step.cold", seconds),
    ("command to first step, compiled before, s", "suites.compile.seconds_to_first_step.warm", seconds),
)


# The tables of `EVALUATION`, by the name of their records. Columns: heading, dotted path in a row, format.
PARAMETERS = ("parameters", "scores.parameters", "{:,d}".format)
SHARED = (
    ("MSE", "scores.reconstruction.mse", "{:.5f}".format),
    ("SSIM", "scores.reconstruction.ssim", "{:.3f}".format),
    ("KL, nats", "scores.likelihood.rate", "{:,.0f}".format),
)
ELBO = ("−ELBO, nats", "scores.likelihood.negative_elbo_at_best_variance", "{:,.0f}".format)  # noqa: RUF001
SAMPLES = ("samples", "scores.features.sample_frechet", "{:.1f}".format)
SWEEPS = {
    "sweep_choices": (PARAMETERS, *SHARED, ELBO),
    "sweep_baselines": (
        *SHARED,
        SAMPLES,
        ("halfway", "scores.features.interpolation_frechet", "{:.1f}".format),
        ("way", "scores.features.interpolation_length", ratio),
        ("jump", "scores.features.interpolation_largest_step", ratio),
    ),
    "sweep_same_time": (
        PARAMETERS,
        ("epochs", "epochs", str),
        ("training, s", "training_seconds", "{:,.0f}".format),
        *SHARED,
        ELBO,
        SAMPLES,
    ),
}


def shown(record: Any, path: str, show: Callable[[Any], str]) -> str:
    """The value at a dotted path, or a dash if it is missing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return MISSING if record is None else show(record)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = (headings, ["---"] * len(headings), *rows)
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]


def throughput_table(records: Mapping[str, Any]) -> list[str]:
    """A table with a column for each file and a row for each figure that any file has."""
    rows = [[label, *(shown(record, path, show) for record in records.values())] for label, path, show in ROWS]
    return markdown(["", *records], [row for row in rows if set(row[1:]) != {MISSING}])


def peers_tables(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each record: every trainer beside ours, the fastest first."""
    lines: list[str] = []
    for record in records:
        peers, median = record["suites"]["peers"], record["suites"]["peers"]["median"]
        fastest = sorted(median.items(), key=lambda item: (-item[1], item[0]))
        rows = [(name, rate(speed), ratio(median["ours"] / speed)) for name, speed in fastest]
        lines += ["", f"On {record['device']}, {record['cpu_cores']} cores of {record['cpu']}: {peers['what']}.", ""]
        lines += markdown(("trainer", "images/s", "ours to it"), rows)
    return lines[1:]


def sweep_table(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table with a line for each run."""
    columns = SWEEPS[name]
    cells = [[row["name"], *(shown(row, path, show) for _, path, show in columns)] for row in rows]
    return markdown(["", *(heading for heading, _, _ in columns)], cells)


def put_between_markers(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with these lines between its markers of that name.

    Raises:
      UserError: the markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"the documents need the lines {begin} and {end}, in this order: put them back.")
    return "\n".join([before + begin, *lines, end + after])


def report(root: pathlib.Path, *, check: bool) -> int:
    """Updates the documents below `root`; `check` writes nothing. Returns the exit code.

    Raises:
      UserError: markers of a document are missing.
    """
    records = {path.stem: json.loads(path.read_text()) for path in sorted((root / RESULTS).glob("*.json"))}
    measured = {
        name.removeprefix(THROUGHPUT): record for name, record in records.items() if name.startswith(THROUGHPUT)
    }
    compared = [record for record in measured.values() if "peers" in record["suites"]]
    tables = [
        (DOCUMENT, "throughput", [*throughput_table(measured), "", *peers_tables(compared)]),
        (README, "throughput", peers_tables(compared[:1])),
        *((EVALUATION, name, sweep_table(name, records[name]["rows"])) for name in SWEEPS if name in records),
    ]
    before = {name: (root / name).read_text() for name, _, _ in tables}
    texts = dict(before)
    for name, marker, lines in tables:
        texts[name] = put_between_markers(texts[name], marker, lines)
    stale = [name for name in texts if texts[name] != before[name]]
    for name in stale:
        if check:
            print(f"{name} differs from the results: run python -m benchmarks.report", file=sys.stderr)
        else:
            (root / name).write_text(texts[name])
            print(f"written: {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "write nothing; the exit code is 1 if anything would change")
    command_line.run(lambda arguments: report(REPOSITORY, check=flags.FLAGS.check))
