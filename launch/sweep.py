#!/usr/bin/env python3
"""Trains and evaluates every combination of some settings, one after another, and writes a JSON file and a table.

    python launch/sweep.py --config=configs/celeba64.py --output=/tmp/sweep \
        --set train.learning_rate=1e-3,2e-3 --set objective.kl_weight=0.5,1 --set train.seed=0,1

A --set whose choices change several settings separates choices by | and settings by ;, as in
--set "objective.likelihood=gaussian;train.ema_decay=0.999|train.seed=1". Finished combinations are skipped, so that the
same command resumes a sweep, and a sweep may grow. --evaluate passes a flag on to facevae_jax.evaluate, such as
--evaluate=--features=my.module:function.
"""

import argparse
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

STOPPED = (129, 130, 138, 140, 143)  # exit codes of a run that saved at a signal, which was meant for the sweep
# Compared scores: heading, path below `scores`, format.
COLUMNS = (
    ("MSE", "reconstruction.mse", ".5f"),
    ("SSIM", "reconstruction.ssim", ".3f"),
    ("-ELBO", "likelihood.negative_elbo", ",.0f"),
    ("rate", "likelihood.rate", ",.0f"),
    ("active", "latents.active_units", "d"),
    ("samples", "features.sample_frechet", ".4f"),
    ("halfway", "features.interpolation_frechet", ".4f"),
    ("path", "features.interpolation_length", ".2f"),
    ("jump", "features.interpolation_largest_step", ".2f"),
)
MISSING = "-"


def choices(text: str) -> list[dict[str, str]]:
    """The choices of one --set: `key=a,b` has one for each value, `key=a;other=b|key=c` one for each part.

    Raises:
      ValueError: the text has neither form.
    """
    key, _, values = text.partition("=")
    parts = text.split("|") if "|" in text or ";" in text else [f"{key}={value}" for value in values.split(",")]
    found = [dict(setting.partition("=")[::2] for setting in part.split(";")) for part in parts]
    if any(not key or not value for choice in found for key, value in choice.items()):
        raise ValueError(f"--set {text!r} must look like key=value,value or key=value;key=value|key=value.")
    return found


def combinations(sets: list[str]) -> list[dict[str, str]]:
    """Every combination of one choice of each --set."""
    combined = itertools.product(*map(choices, sets))
    return [dict(itertools.chain.from_iterable(choice.items() for choice in combination)) for combination in combined]


def name_of(settings: dict[str, str]) -> str:
    """The folder of a combination."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()]
    return ",".join(parts).replace("/", "_") or "as_is"


def run_command(words: list[str], log: pathlib.Path) -> int:
    """Runs `python -m` and returns its exit code; an interrupted sweep lets it save first.

    It has a session of its own, so that Ctrl-C in a terminal reaches it only through the sweep.

    Raises:
      KeyboardInterrupt: a signal stopped the sweep or the command.
    """
    command = [sys.executable, "-m", *words]
    with (
        log.open("a") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if code in STOPPED:
        raise KeyboardInterrupt
    return code


def run_one(config: str, workdir: pathlib.Path, settings: dict[str, str], evaluate: list[str]) -> dict[str, Any]:
    """Trains and evaluates one combination."""
    started = time.monotonic()
    log, scores = workdir.with_name(f"{workdir.name}.log"), workdir / "sweep_scores.json"
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    for words in (
        ["facevae_jax.main", f"--config={config}", f"--workdir={workdir}", *overrides],
        ["facevae_jax.evaluate", f"--workdir={workdir}", f"--json={scores}", *evaluate],
    ):
        if code := run_command(words, log):
            return {"failed": code, "reason": log.read_text().splitlines()[-1], "log": str(log)}
    return {"seconds": time.monotonic() - started, "scores": json.loads(scores.read_text())}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns of the scores that any row has, the best MSE first, and the combinations that failed."""

    def cell(row: dict[str, Any], path: str, form: str) -> str:
        section, key = path.split(".")
        value = row["scores"].get(section, {}).get(key)
        return MISSING if value is None else format(value, form)

    done = sorted((row for row in rows if "scores" in row), key=lambda row: row["scores"]["reconstruction"]["mse"])
    columns = [[heading, *(cell(row, path, form) for row in done)] for heading, path, form in COLUMNS]
    columns = [column for column in columns if set(column[1:]) - {MISSING}]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    columns.append(["settings", *(name_of(row["settings"]) for row in done)])
    lines = ["  ".join(cells) for cells in zip(*columns, strict=True)]
    lines += [f"failed: {name_of(row['settings'])}: {row['reason']} ({row['log']})" for row in rows if "failed" in row]
    return "\n".join(lines)


def sweep(config: str, output: pathlib.Path, sets: list[str], evaluate: list[str]) -> int:
    """Runs the combinations that are missing and writes the results after each; returns 1 if any failed.

    Raises:
      ValueError: a --set has the wrong form.
    """
    wanted = combinations(sets)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "sweep.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    for number, settings in enumerate(wanted, 1):
        request = {"settings": settings, "config": config, "evaluate": evaluate}
        if any("scores" in row and row.items() >= request.items() for row in rows):
            continue
        name = name_of(settings)
        print(f"{number} of {len(wanted)}: {name}", flush=True)
        rows = [row for row in rows if row["settings"] != settings]
        rows.append({**request, "folder": name, **run_one(config, output / name, settings, evaluate)})
        temporary = results.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1))
        temporary.replace(results)
    print(table(rows))
    return int(any("failed" in row for row in rows))


def main() -> int:
    """Returns 0, 1 if a combination failed, 2 for a mistake in the command, 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=A,B")
    parser.add_argument("--evaluate", action="append", default=[], metavar="--FLAG=VALUE")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C
    try:
        return sweep(options.config, options.output, options.set, options.evaluate)
    except (OSError, ValueError) as error:
        where = f"{error.filename}: {error.strerror}: set another --output." if isinstance(error, OSError) else error
        print(f"error: {where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command resumes the sweep.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
