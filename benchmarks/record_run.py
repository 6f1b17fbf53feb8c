"""From a finished run to one JSON file of its figures.

python -m benchmarks.record_run --workdir=/tmp/celeba64 --output=benchmarks/results/celeba64_cpu.json

Run it on the machine, in the environment and at the commit of the run, before facevae_jax/ or configs/ change.
"""

import json
import pathlib
import statistics

from absl import app, flags

from benchmarks.environment import environment
from facevae_jax.files import write_json
from facevae_jax.training.telemetry import read_metrics
from facevae_jax.training.workdir import CONFIG_FILE

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)


def main(arguments: list[str]) -> None:
    """Reads `metrics.jsonl` and `config.json`, writes and prints the record."""
    del arguments
    workdir = pathlib.Path(_WORKDIR.value)
    lines = read_metrics(workdir)
    rates = [line["images_per_second"] for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    last = evaluations[-1]
    record = {
        "what": "one training run; images per second while training, without compilation and evaluation",
        "split": last["split"],
        "steps": last["step"],
        "loss": last["loss"],
        "mse": last["mse"],
        "kl_nats": last["kl"],
        "images_per_second_median": statistics.median(rates),
        "images_per_second_range": [min(rates), max(rates)],
        "wall_seconds": (workdir / "metrics.jsonl").stat().st_mtime - (workdir / CONFIG_FILE).stat().st_mtime,
        "config": json.loads((workdir / CONFIG_FILE).read_text()),
        **environment(),
    }
    record["config"]["data"].pop("data_dir", None)  # a path of one machine
    write_json(pathlib.Path(_OUTPUT.value), record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    app.run(main)
