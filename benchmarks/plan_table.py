"""Plans of the project's configs for accelerators that are not here, as JSON and as the table of docs/accelerators.md.

PYTHONPATH=COMPILERS python -m benchmarks.plan_table --topologies=1xh100,8xh100,2x8xh100

COMPILERS is a folder into which the compilers were installed (`pip install --no-deps --target=COMPILERS ...`, see the
page). What the JSON has of this commit is not compiled again, so the same command finishes an interrupted table.
"""

import json
import subprocess
import sys
from typing import Any

from absl import flags

from benchmarks.environment import REPOSITORY, environment
from facevae_jax.core import command_line
from facevae_jax.core.files import write_json

CONFIGS = {  # with the number of training images of the published datasets
    "gdl128": 162_770,
    "ffhq64": 60_000,
    "ffhq128": 60_000,
    "ffhq256": 60_000,
    "celeba64": 162_770,
    "celeba64_spatial": 162_770,
}
TOPOLOGIES = ("v5e-1", "v5e-4", "v5e-16", "v6e-4", "v5p-8", "1xh100", "8xh100", "2x8xh100")
# And with a batch of 128 images a device, which fills a TPU's lanes: config, topology, images in the batch.
LARGE = (("gdl128", "v5e-1", 128), ("ffhq128", "v5e-4", 512), ("ffhq128", "8xh100", 1024))
RESULTS, PAGE = REPOSITORY / "benchmarks/results/plans.json", REPOSITORY / "docs/accelerators.md"
START, END = "<!-- plans -->\n", "<!-- end of plans -->\n"

_TOPOLOGIES = flags.DEFINE_list("topologies", list(TOPOLOGIES), "What to compile for.")
_CONFIGS = flags.DEFINE_list("configs", list(CONFIGS), "What to compile.")


def main(arguments: list[str]) -> None:
    """Compiles what is missing, one program after the other."""
    found, record = environment(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if record.get("commit") != found["commit"]:
        record = {"plans": {}}
    wanted = [(config, topology, 0) for config in _CONFIGS.value for topology in _TOPOLOGIES.value]
    wanted += [each for each in LARGE if each[0] in _CONFIGS.value and each[1] in _TOPOLOGIES.value]
    for config, topology, batch in wanted:
        label = f"{config}, batch {batch}" if batch else config
        if topology not in record["plans"].setdefault(label, {}):
            record["plans"][label][topology] = plan_of(config, topology, batch=batch)
            write_json(RESULTS, {"command": "python -m benchmarks.plan_table", **record, **found})
    text = PAGE.read_text()
    head, tail = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(head + START + table(record["plans"]) + END + tail)


def plan_of(config: str, topology: str, *, batch: int) -> dict[str, Any]:
    """The plan as a dictionary; what does not fit is an `error`."""
    flags_of = [f"--config={config}", f"--topology={topology}", f"--images={CONFIGS[config]}", "--json"]
    if batch:
        flags_of.append(f"--config.train.batch_size={batch}")
    command = [sys.executable, "-m", "facevae_jax.plan", *flags_of]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    print(f"{config} {topology} {batch or ''}: exit code {result.returncode}", flush=True)
    if result.returncode and "does not fit" not in result.stderr:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)[0] if not result.returncode else {"error": result.stderr.strip().splitlines()[-1]}


def table(plans: dict[str, Any]) -> str:
    """Markdown: a line for each config and topology."""
    lines = [
        "| config | topology | images each | feed | memory, GiB | sent, MB a step | step | ms | images/s | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for config, by_topology in plans.items():
        for topology, plan in by_topology.items():
            if "error" in plan:
                lines.append(f"| {config} | {topology} | | | does not fit | | | | | |")
                continue
            sent = sum(size for _, size in plan["exchanges"].values()) / 1e6
            milliseconds, minutes = 1e3 * plan["estimated_step_seconds"], 60 * plan["hours"]
            time = f"{milliseconds:.2f} | {plan['images_per_second']:,.0f} | {minutes:.1f}"
            work = f"{plan['cycles'] / 1e6:.2f} M cycles" if plan["cycles"] else f"{plan['launches']} launches"
            lines.append(
                f"| {config} | {topology} | {plan['images_per_device']:g} | {plan['feed'].partition(':')[0]} "
                f"| {plan['peak_bytes'] / 2**30:.2f} of {plan['memory_bytes'] / 2**30:.1f} | {sent:.1f} | {work} "
                f"| {time} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line.run(main)
