"""Writes the tables of benchmarks/results/throughput_*.json into docs/throughput.md and README.md.

python -m benchmarks.report            writes them; README.md gets the first comparison with other trainers
python -m benchmarks.report --check    writes nothing; the exit code is 1 if the documents differ from the JSON files
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.environment import REPOSITORY
from facevae_jax.core import command_line
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import atomic_writer

RESULTS, PATTERN = "benchmarks/results", "throughput_*.json"
DOCUMENT, README = "docs/throughput.md", "README.md"
NOTHING = "Nothing has been measured yet."
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
    ("share of the roofline", "suites.step.share_of_roofline", percent),
    ("work, MFLOP an image", "suites.roofline.mflop_per_image", rate),
    ("least traffic, MB an image", "suites.roofline.mbyte_per_image", rate),
    ("matrix product, GFLOP/s", "suites.roofline.matmul_gflop_per_second", rate),
    ("memory, GB/s", "suites.roofline.copy_gbyte_per_second", rate),
    ("bound by arithmetic, images/s", "suites.roofline.bound_images_per_second.arithmetic", rate),
    ("bound by memory, images/s", "suites.roofline.bound_images_per_second.memory", rate),
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
    *(
        row
        for kind in ("JPEG 178x218", "PNG 128x128", "PNG 1024x1024", "JPEG 1024x1024")
        for path in [f"suites.prepare.{kind.lower().replace(' ', '_')}"]
        for row in (
            (f"preparing {kind}, images/s", f"{path}.images_per_second", rate),
            (f"its time to the decoder's on all cores, {kind}", f"{path}.ratio_to_decoder", ratio),
        )
    ),
    ("ours to the best of PyTorch", "suites.peers.ratio_to_best_torch", ratio),
    ("ours to pythae", "suites.peers.ratio_to_pythae", ratio),
    ("ours to Keras' fit", "suites.peers.ratio_to_keras_fit", ratio),
)


def look_up(record: Any, path: str) -> Any:
    """The value at a dotted path; None if it is missing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = (headings, ["---"] * len(headings), *rows)
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]


def table(records: Mapping[str, Any]) -> list[str]:
    """A table with a column for each file and a row for each figure that any file has."""
    rows = []
    for label, path, show in ROWS:
        values = [look_up(record, path) for record in records.values()]
        if any(value is not None for value in values):
            rows.append([label, *(MISSING if value is None else show(value) for value in values)])
    return markdown(["", *records], rows)


def peers_tables(records: Mapping[str, Any]) -> list[str]:
    """A table for each file with the suite `peers`: every trainer beside ours, the fastest first."""
    lines: list[str] = []
    for record in records.values():
        median = look_up(record, "suites.peers.median")
        if median:
            where = f"{record.get('device')}, {record.get('cpu_cores')} cores of {record.get('cpu')}"
            ours = median.get("ours")
            fastest = sorted(median.items(), key=lambda item: (-item[1], item[0]))
            rows = [(name, rate(speed), ratio(ours / speed) if ours else MISSING) for name, speed in fastest]
            lines += ["", f"On {where}: {record['suites']['peers']['what']}.", ""]
            lines += markdown(("trainer", "images/s", "ours to it"), rows)
    return lines[1:]


def put_between_markers(path: pathlib.Path, name: str, lines: Sequence[str]) -> str:
    """The text of the file with these lines between its markers of that name.

    Raises:
      UserError: the file or its markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = (path.read_text() if path.exists() else "").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} needs the lines {begin} and {end}, in this order: put them back.")
    return "\n".join([before + begin, *lines, end + after])


def report(root: pathlib.Path, *, check: bool) -> int:
    """Updates the documents below `root`; `check` writes nothing. Returns the exit code.

    Raises:
      UserError: a document or its markers are missing.
    """
    paths = sorted((root / RESULTS).glob(PATTERN))
    records = {path.stem.removeprefix("throughput_"): json.loads(path.read_text()) for path in paths}
    first = next(({name: record} for name, record in records.items() if look_up(record, "suites.peers.median")), {})
    contents = {
        root / DOCUMENT: [*table(records), "", *peers_tables(records)] if records else [NOTHING],
        root / README: peers_tables(first) or [NOTHING],
    }
    texts = {path: put_between_markers(path, "throughput", lines) for path, lines in contents.items()}
    stale = {path: text for path, text in texts.items() if path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path} differs from the results: run python -m benchmarks.report", file=sys.stderr)
            continue
        with atomic_writer(path) as file:
            file.write(text.encode())
        print(f"written: {path}")
    return int(check and bool(stale))


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "write nothing; the exit code is 1 if anything would change")
    command_line.run(lambda arguments: report(REPOSITORY, check=flags.FLAGS.check))
