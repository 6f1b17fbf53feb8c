"""From benchmarks/results/throughput_*.json to docs/throughput.md, its plots and README.md; no figure is typed by hand.

python -m benchmarks.report            writes them; README.md gets the first comparison with other trainers
python -m benchmarks.report --check    writes nothing; the exit code is 1 if they are not what the JSON files give
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from PIL import Image

from benchmarks.environment import REPOSITORY
from facevae_jax import command_line
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer

RESULTS, PATTERN = "benchmarks/results", "throughput_*.json"
DOCUMENT, README = "docs/throughput.md", "README.md"
NOTHING = "Nothing has been measured yet."
BEGIN, END = "<!-- throughput:begin -->", "<!-- throughput:end -->"
OURS = "ours"
MISSING = "–"  # noqa: RUF001 - a dash in an empty cell
DATA_KEY = "Data-SHA256"  # in a plot's PNG: of what it shows
AXES = {"batch_size": "batch size", "resolution": "resolution, pixels", "latent_dim": "latent dimensions"}


class Row(NamedTuple):
    """One line of the table."""

    label: str
    path: str  # in the JSON file, with dots
    show: Callable[[Any], str]


def rate(value: float) -> str:
    """Three significant digits below 1000, whole numbers above."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def ratio(value: float) -> str:
    """A multiple."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """Seconds to a tenth."""
    return f"{value:.1f}"


ROWS = (
    Row("device", "device", str),
    Row("processor", "cpu", str),
    Row("processor's cores", "cpu_cores", str),
    Row("jax", "versions.jax", str),
    Row("commit", "commit", lambda commit: f"`{commit[:8]}{'+' if commit.endswith('+') else ''}`"),
    Row("resolution, pixels", "settings.config.data.resolution", str),
    Row("batch", "settings.config.train.batch_size", str),
    Row("dtype", "settings.config.model.dtype", str),
    Row("training steps alone, images/s", "suites.step.images_per_second", rate),
    Row("one step, ms", "suites.step.milliseconds_per_step", rate),
    Row("share of the roofline", "suites.step.share_of_roofline", percent),
    Row("work, MFLOP an image", "suites.roofline.mflop_per_image", rate),
    Row("least traffic, MB an image", "suites.roofline.mbyte_per_image", rate),
    Row("matrix product, GFLOP/s", "suites.roofline.matmul_gflop_per_second", rate),
    Row("memory, GB/s", "suites.roofline.copy_gbyte_per_second", rate),
    Row("bound by arithmetic, images/s", "suites.roofline.bound_images_per_second.arithmetic", rate),
    Row("bound by memory, images/s", "suites.roofline.bound_images_per_second.memory", rate),
    Row("whole run, resident, to the step alone", "suites.end_to_end.resident_to_step", ratio),
    Row("whole run, streamed, to the step alone", "suites.end_to_end.streamed_to_step", ratio),
    Row("time outside dispatches, resident", "suites.end_to_end.outside_dispatches_share.resident", percent),
    Row("time outside dispatches, streamed", "suites.end_to_end.outside_dispatches_share.streamed", percent),
    Row("feed alone, resident, images/s", "suites.input.images_per_second.resident", rate),
    Row("feed alone, streamed, images/s", "suites.input.images_per_second.streamed", rate),
    *(Row(f"decoding {n} latents, images/s", f"suites.sampling.images_per_second.{n}", rate) for n in (1, 64, 512)),
    Row("tracing and lowering, s", "suites.compile.seconds.trace_and_lower", seconds),
    Row("compiling, s", "suites.compile.seconds.compile", seconds),
    Row("command to first step, nothing compiled, s", "suites.compile.seconds_to_first_step.cold", seconds),
    Row("command to first step, compiled before, s", "suites.compile.seconds_to_first_step.warm", seconds),
    *(
        row
        for kind, label in (
            ("celeba", "CelebA"),
            ("ffhq", "FFHQ"),
            ("folder", "a folder"),
            ("jpeg_178x218", "JPEG 178x218"),
            ("png_128x128", "PNG 128x128"),
            ("png_1024x1024", "PNG 1024x1024"),
            ("jpeg_1024x1024", "JPEG 1024x1024"),
        )
        for row in (
            Row(f"preparing {label}, images/s", f"suites.prepare.{kind}.images_per_second", rate),
            Row(f"its time to the decoder's on all cores, {label}", f"suites.prepare.{kind}.ratio_to_decoder", ratio),
        )
    ),
    Row("ours to the best of PyTorch", "suites.peers.ratio_to_best_torch", ratio),
    Row("ours to pythae", "suites.peers.ratio_to_pythae", ratio),
    Row("ours to Keras' fit", "suites.peers.ratio_to_keras_fit", ratio),
)


def look_up(record: Any, path: str) -> Any:
    """The value at a path with dots; None where it is missing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def table(records: Mapping[str, Any]) -> list[str]:
    """A Markdown table with a row for each figure that any of the files has, and a column for each file."""
    lines = [f"| | {' | '.join(records)} |", f"| --- |{' --- |' * len(records)}"]
    for row in ROWS:
        values = [look_up(record, row.path) for record in records.values()]
        if any(value is not None for value in values):
            cells = [MISSING if value is None else row.show(value) for value in values]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def peers_tables(records: Mapping[str, Any]) -> list[str]:
    """For each file with the suite `peers`, every trainer beside ours, the fastest first."""
    lines: list[str] = []
    for record in records.values():
        peers = look_up(record, "suites.peers")
        if not peers or "median" not in peers:
            continue
        median, where = (
            peers["median"],
            f"{record.get('device')}, {record.get('cpu_cores')} cores of {record.get('cpu')}",
        )
        ours = median.get(OURS)
        lines += ["", f"On {where}: {peers['what']}.", "", "| trainer | images/s | ours to it |", "| --- | --- | --- |"]
        for name, speed in sorted(median.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"| {name} | {rate(speed)} | {ratio(ours / speed) if ours else MISSING} |")
    return lines[1:]


def section(records: Mapping[str, Any]) -> list[str]:
    """The lines between the document's markers."""
    lines = table(records)
    if peers := peers_tables(records):
        lines += ["", *peers]
    for name in grown(records):
        lines += ["", f"![{name}: images/s by batch size, resolution, latent size]({plot_name(name)})"]
    return lines


def grown(records: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The points (x, images/s) of every file that has the suite `growth`, by axis."""
    suites = {name: look_up(record, "suites.growth") for name, record in records.items()}
    return {
        name: {axis: [(point["x"], point["images_per_second"]) for point in suite[axis]] for axis in AXES}
        for name, suite in suites.items()
        if suite and "skipped" not in suite
    }


def plot_name(name: str) -> str:
    """The file of a plot, beside the document."""
    return f"throughput_{name}.png"


def digest(series: Any) -> str:
    """SHA-256 of what a plot shows."""
    return hashlib.sha256(json.dumps(series).encode()).hexdigest()


def draw(path: pathlib.Path, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Writes three small panels of images/s; by resolution, which changes it a hundredfold, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    plain = FuncFormatter(lambda value, position: f"{value:,.10g}")
    figure, panels = pyplot.subplots(1, len(series), figsize=(3.6 * len(series), 2.8), layout="constrained")
    for panel, (axis, points) in zip(panels, series.items(), strict=True):
        sizes, rates = [x for x, _ in points], [y for _, y in points]
        panel.plot(sizes, rates, marker="o", markersize=4)
        panel.set(xscale="log", xlabel=AXES[axis])
        panel.set_xticks(sizes, minor=False)
        panel.xaxis.set_major_formatter(plain)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", labelrotation=60)
        if axis == "resolution":
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(plain)  # after the scale, which sets its own
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training steps, images/s")
    # Without its version, which matplotlib would write into the file.
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None, DATA_KEY: digest(series)})
    pyplot.close(figure)


def is_current(path: pathlib.Path, series: Any) -> bool:
    """Whether the plot shows these points; its pixels may differ with the version of matplotlib."""
    try:
        with Image.open(path) as image:
            return image.info.get(DATA_KEY) == digest(series)
    except OSError:
        return False


def put_between_markers(path: pathlib.Path, lines: Sequence[str]) -> str:
    """The text of the file with these lines between its markers.

    Raises:
      UserError: the file or its markers are missing.
    """
    before, begin, rest = (path.read_text() if path.exists() else "").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} needs the lines {BEGIN} and {END}, in this order: put them back.")
    return "\n".join([before + BEGIN, *lines, END + after])


def report(root: pathlib.Path, *, check: bool) -> list[pathlib.Path]:
    """Writes what is not current and returns its paths; writes nothing with `check`.

    Args:
      root: of the repository.
      check: whether to look only.

    Raises:
      UserError: a document or its markers are missing.
    """
    paths = sorted((root / RESULTS).glob(PATTERN))
    records = {path.stem.removeprefix("throughput_"): json.loads(path.read_text()) for path in paths}
    first = next(({name: record} for name, record in records.items() if look_up(record, "suites.peers.median")), {})
    contents = {
        root / DOCUMENT: section(records) if records else [NOTHING],
        root / README: peers_tables(first) or [NOTHING],
    }
    texts = {path: put_between_markers(path, lines) for path, lines in contents.items()}
    stale = [path for path, text in texts.items() if path.read_text() != text]
    series = {(root / DOCUMENT).with_name(plot_name(name)): points for name, points in grown(records).items()}
    stale += [path for path, points in series.items() if not is_current(path, points)]
    for path in () if check else stale:
        if path in series:
            draw(path, series[path])
        else:
            with atomic_writer(path) as file:
                file.write(texts[path].encode())
    return stale


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_bool("check", False, "write nothing; the exit code is 1 if anything would change")
    flags.DEFINE_string("root", str(REPOSITORY), "the repository")


def main(arguments: list[str]) -> int:
    """Writes or checks."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood: flags look like --name=value.")
    values = flags.FLAGS
    try:
        stale = report(pathlib.Path(values.root), check=values.check)
    except ModuleNotFoundError as error:
        raise UserError(f"plots need {error.name}: pip install matplotlib.") from error
    for path in stale:
        if values.check:
            print(f"{path} is not what the results give: run python -m benchmarks.report", file=sys.stderr)
        else:
            print(f"written: {path}")
    return int(values.check and bool(stale))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
