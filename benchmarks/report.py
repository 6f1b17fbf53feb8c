"""From benchmarks/results/throughput_*.json to the tables and the picture of docs/throughput.md.

python -m benchmarks.report           writes them, and the comparison with other trainers into README.md
python -m benchmarks.report --check   exits 1 where the documents do not say what the results give
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import tables
from benchmarks.environment import REPOSITORY

BEGIN, END = "<!-- throughput:begin -->", "<!-- throughput:end -->"
RESULTS, DOCUMENT, README = "benchmarks/results", "docs/throughput.md", "README.md"
PICTURE = "throughput_growth.png"
NOTHING = "Nothing has been measured yet."
PEERS, GROWTH = "peers", "growth"
PANELS = {"batch_size": "batch size", "resolution": "resolution, pixels", "latent_dim": "latent dimensions"}
INTRODUCTION = f"""# Throughput

How fast this project trains, measured by one command:

    pip install -e ".[bench]"
    python -m benchmarks.throughput --suite=all --config=configs/gdl128.py --config.model.dropout_rate=0 \\
        --json=benchmarks/results/throughput_cpu.json
    python -m benchmarks.throughput --suite=peers --json=benchmarks/results/throughput_peers_cpu.json
    python -m benchmarks.report

`--suite` takes a comma-separated list; `--rounds` and `--seconds` say how often and how long each case is timed. Cases
take turns, and the figures are medians; the JSON files hold every timing. `python -m benchmarks.report --check` tells
whether the figures below are those of the files.

{BEGIN}
{END}
"""


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the documents; the exit code is 1 where a check fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    parser.add_argument("--root", type=pathlib.Path, default=REPOSITORY, help="of the repository")
    given = parser.parse_args(arguments)
    results = read_results(given.root / RESULTS)
    wanted = documents(given.root, results)
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    if given.check:
        for path in stale:
            print(f"{path} is out of date: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        print(f"written: {path}")
    grown = with_suite(results, GROWTH)
    if grown:
        draw_growth(grown, given.root / DOCUMENT.rpartition("/")[0] / PICTURE)
    return 0


def read_results(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The runs by file name, in its order."""
    return {path.name: json.loads(path.read_text()) for path in sorted(directory.glob("throughput_*.json"))}


def with_suite(results: Mapping[str, dict[str, Any]], suite: str) -> dict[str, dict[str, Any]]:
    """The runs in which a suite was measured."""
    return {name: run for name, run in results.items() if suite in run["suites"] and "what" in run["suites"][suite]}


def documents(root: pathlib.Path, results: Mapping[str, dict[str, Any]]) -> dict[pathlib.Path, str]:
    """What every document should say."""
    document, readme = root / DOCUMENT, root / README
    text = document.read_text() if document.exists() else INTRODUCTION
    wanted = {document: between_markers(text, all_tables(results))}
    if readme.exists() and has_markers(readme.read_text()):
        wanted[readme] = between_markers(readme.read_text(), peers_tables(results))
    return wanted


def has_markers(text: str) -> bool:
    """Whether both markers are there, in order."""
    return END in text.partition(BEGIN)[2]


def between_markers(text: str, content: str) -> str:
    """The text with `content` between the markers, which are added at the end where they are missing."""
    if not has_markers(text):
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}"


def all_tables(results: Mapping[str, dict[str, Any]]) -> str:
    """Every suite of every run."""
    parts = []
    for name, run in results.items():
        parts += [f"## {name.removesuffix('.json').removeprefix('throughput_').replace('_', ' ')}", machine(run)]
        for suite, record in run["suites"].items():
            parts += [f"### {suite}", *section(suite, record)]
    if with_suite(results, GROWTH):
        parts.insert(0, f"![Images per second by batch size, resolution and latent dimensions]({PICTURE})")
    return "\n\n".join(parts) or NOTHING


def section(suite: str, record: Mapping[str, Any]) -> list[str]:
    """The paragraphs of one suite."""
    if "what" not in record:
        return [f"Skipped: {record['skipped']}"]
    parts = [sentence(record["what"]), tables.markdown(tables.table(suite, record))]
    return parts + [sentence(note) for note in record.get("notes", [])]


def peers_tables(results: Mapping[str, dict[str, Any]]) -> str:
    """The comparison with other trainers alone."""
    parts = []
    for run in with_suite(results, PEERS).values():
        record = run["suites"][PEERS]
        parts += [sentence(record["what"]) + " " + machine(run), tables.markdown(tables.peers_table(record))]
    return "\n\n".join(parts) or NOTHING


def sentence(words: str) -> str:
    """With a capital letter and a full stop."""
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith('.') else '.'}"


def machine(run: Mapping[str, Any]) -> str:
    """Where and with what a run was measured."""
    packages = f"jax {run['versions']['jax']}"
    place = f"{run['device']}, {run['cpu']} with {run['cpu_cores']} cores"
    return f"Measured on {place}; {packages}, commit {run['commit'][:8]}{'+' * run['commit'].endswith('+')}."


def draw_growth(results: Mapping[str, dict[str, Any]], path: pathlib.Path) -> None:
    """One panel a series, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10.5, 3.2), layout="constrained")
    for panel, (series, label) in zip(axes, PANELS.items(), strict=True):
        ticks: set[float] = set()
        for run in results.values():
            points = run["suites"][GROWTH].get(series, [])
            x = [point["x"] for point in points]
            ticks |= set(x)
            panel.plot(x, [point["images_per_second"] for point in points], marker="o", markersize=4, label=name(run))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("training, images/s")
    axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same figures give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    print(f"written: {path}")


def name(run: Mapping[str, Any]) -> str:
    """A run's machine in a few words."""
    return f"{run['cpu']}, {run['cpu_cores']} cores" if run["device"].endswith("cpu") else run["device"]


if __name__ == "__main__":
    sys.exit(main())
