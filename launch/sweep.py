#!/usr/bin/env python3
"""Trains and evaluates every combination of some settings, one after another, into one JSON file and a plot.

    python launch/sweep.py --config=configs/celeba64.py --output=/tmp/sweep \
        --set model.latent_dim=64,200 --set objective.kl_weight=0.5,1 --set train.seed=0,1

Values that belong together go into one --set: --set "objective.likelihood=gaussian;train.ema_decay=0.999|train.seed=1"
has two. What is done already is not done again, so that a sweep that was stopped goes on by the same command, and may
grow. --evaluate passes flags on to facevae_jax.evaluate, such as --evaluate=--features=my.module:function.
"""

import argparse
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, TextIO

STOPPED = (130, 143)  # exit codes of a run that saved at a signal, which was meant for the sweep


def choices(text: str) -> list[dict[str, str]]:
    """One --set: `key=a,b` has a choice for each value, `key=a;other=b|key=c` one for each part between bars.

    Raises:
      ValueError: it is neither.
    """
    if "|" in text or ";" in text:
        found = [dict(setting.partition("=")[::2] for setting in part.split(";")) for part in text.split("|")]
    else:
        key, _, values = text.partition("=")
        found = [{key: value} for value in values.split(",")]
    if any(not key or not value for choice in found for key, value in choice.items()):
        raise ValueError(f"--set {text!r} must look like key=value,value or key=value;key=value|key=value.")
    return found


def combinations(sets: list[str]) -> list[dict[str, str]]:
    """Every combination of one choice of each --set."""
    return [
        {key: value for choice in combination for key, value in choice.items()}
        for combination in itertools.product(*(choices(text) for text in sets))
    ]


def name_of(settings: dict[str, str]) -> str:
    """A folder's name."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()]
    return ",".join(parts).replace("/", "_") or "as_is"


def run_to_its_end(command: list[str], log: TextIO) -> int:
    """The exit code of a command, which is told once to stop where the sweep is, and then has the time that it needs.

    In a session of its own: of a terminal's Ctrl-C it hears by the sweep alone.
    """
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def stop(number: int, frame: object) -> None:
    """Makes of a signal what Ctrl-C is."""
    raise KeyboardInterrupt


def run_one(config: str, workdir: pathlib.Path, settings: dict[str, str], evaluate: list[str]) -> dict[str, Any]:
    """Trains and evaluates one combination.

    Raises:
      KeyboardInterrupt: it was stopped by a signal.
    """
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    started = time.monotonic()
    log = workdir.with_name(f"{workdir.name}.log")
    scores = workdir / "sweep_scores.json"
    commands = [
        ["facevae_jax.main", f"--config={config}", f"--workdir={workdir}", *overrides],
        ["facevae_jax.evaluate", f"--workdir={workdir}", f"--json={scores}", *evaluate],
    ]
    for command in commands:
        with log.open("a") as file:
            code = run_to_its_end([sys.executable, "-m", *command], file)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code:
            return {"failed": code, "reason": log.read_text().splitlines()[-1], "log": str(log)}
    return {"seconds": time.monotonic() - started, "scores": json.loads(scores.read_text())}


# What a reader compares: a heading, where the score stands in a row, and how it is written.
COLUMNS = (
    ("MSE", "scores.reconstruction.mse", ".5f"),
    ("SSIM", "scores.reconstruction.ssim", ".3f"),
    ("-ELBO", "scores.likelihood.negative_elbo", ",.0f"),
    ("rate", "scores.likelihood.rate", ",.0f"),
    ("active", "scores.latents.active_units", "d"),
    ("samples", "scores.features.sample_frechet", ".4f"),
    ("halfway", "scores.features.interpolation_frechet", ".4f"),
    ("way", "scores.features.interpolation_length", ".2f"),
    ("jump", "scores.features.interpolation_largest_step", ".2f"),
    ("s", "seconds", ".0f"),
)
MISSING = "-"


def look_up(row: Any, path: str) -> Any:
    """The value at a path with dots; None where it is missing."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line of headings and one for each row that was scored, the best MSE first, without columns that no row has."""
    done = sorted((row for row in rows if "scores" in row), key=lambda row: row["scores"]["reconstruction"]["mse"])
    shown = [column for column in COLUMNS if any(look_up(row, column[1]) is not None for row in done)]
    lines = [[heading for heading, _, _ in shown] + ["settings"]]
    for row in done:
        values = [(look_up(row, path), form) for _, path, form in shown]
        written = [MISSING if value is None else format(value, form) for value, form in values]
        lines.append([*written, name_of(row["settings"])])
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """`cells` with aligned columns, and what failed."""
    lines = cells(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    lines = ["  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines]
    lines += [f"failed: {name_of(row['settings'])}: {row['reason']} ({row['log']})" for row in rows if "failed" in row]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Rate against mean squared error, a point for each combination; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="rate, nats", ylabel="validation MSE", yscale="log")
    for row in rows:
        if "likelihood" in row.get("scores", {}):
            at = row["scores"]["likelihood"]["rate"], row["scores"]["reconstruction"]["mse"]
            axes.plot(*at, "o")
            axes.annotate(name_of(row["settings"]), at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Runs what is missing and writes the results after each; 1 if some of it failed, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=A,B")
    parser.add_argument("--evaluate", action="append", default=[], metavar="--FLAG=VALUE")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        return sweep(options)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}: give another --output.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from what is done.", file=sys.stderr)
        return 130


def sweep(options: argparse.Namespace) -> int:
    """See `main`.

    Raises:
      ValueError: --set is not understood.
    """
    wanted = combinations(options.set)
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "sweep.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    for number, settings in enumerate(wanted, 1):
        asked = {"settings": settings, "config": options.config, "evaluate": options.evaluate}
        if any("scores" in row and all(row.get(key) == value for key, value in asked.items()) for row in rows):
            continue
        print(f"{number} of {len(wanted)}: {name_of(settings)}", flush=True)
        rows = [row for row in rows if row["settings"] != settings]
        found = run_one(options.config, options.output / name_of(settings), settings, options.evaluate)
        rows.append({**asked, "folder": name_of(settings), **found})
        aside = results.with_suffix(".tmp")
        aside.write_text(json.dumps(rows, indent=1))
        aside.replace(results)
    plot(rows, options.output / "sweep.png")
    print(table(rows))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
