"""Plans of the project's configs for accelerators that are not here, as JSON and as the table of docs/accelerators.md.

PYTHONPATH=COMPILERS python -m benchmarks.plan_table --topologies=1xh100,8xh100,2x8xh100
PYTHONPATH=COMPILERS python -m benchmarks.plan_table --table=hierarchies

COMPILERS is a folder into which the compilers were installed (`pip install --no-deps --target=COMPILERS ...`, see the
page). What the JSON has of this commit is not compiled again, so the same command finishes an interrupted table.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags

from benchmarks.environment import REPOSITORY, environment
from facevae_jax.core import command_line
from facevae_jax.core.files import write_json

PAGE = REPOSITORY / "docs/accelerators.md"


class Table(NamedTuple):
    """What a table has; its place in the page is between two comments with its name."""

    configs: dict[str, int]  # with the number of training images of the published datasets
    topologies: tuple[str, ...]
    results: pathlib.Path
    # And with other settings, such as a batch that fills a TPU's lanes: config, topology, values by key.
    more: tuple[tuple[str, str, dict[str, int | bool]], ...] = ()


TABLES = {
    "plans": Table(
        {
            "gdl128": 162_770,
            "ffhq64": 60_000,
            "ffhq128": 60_000,
            "ffhq256": 60_000,
            "celeba64": 162_770,
            "celeba64_spatial": 162_770,
        },
        ("v5e-1", "v5e-4", "v5e-16", "v6e-4", "v5p-8", "1xh100", "8xh100", "2x8xh100"),
        REPOSITORY / "benchmarks/results/plans.json",
        (
            ("gdl128", "v5e-1", {"train.batch_size": 128}),
            ("ffhq128", "v5e-4", {"train.batch_size": 512}),
            ("ffhq128", "8xh100", {"train.batch_size": 1024}),
        ),
    ),
    "hierarchies": Table(
        {"ffhq128_deep": 60_000, "ffhq256_deep": 60_000, "vdvae_ffhq256": 60_000},
        (),
        REPOSITORY / "benchmarks/results/plans_hierarchies.json",
        (
            # In no more parts than `plan` finds to be necessary.
            ("ffhq128_deep", "8xh100", {"train.accumulation": 1}),
            ("ffhq256_deep", "8xh100", {"train.accumulation": 1}),
            ("vdvae_ffhq256", "8xh100", {"train.accumulation": 2}),
            ("ffhq128_deep", "v6e-4", {"train.accumulation": 4}),
            ("ffhq256_deep", "v6e-4", {"train.accumulation": 8}),
            ("vdvae_ffhq256", "v6e-4", {"model.rematerialize": True, "train.accumulation": 4}),
            ("ffhq128_deep", "v5e-16", {"train.accumulation": 2}),
            ("ffhq256_deep", "v5e-16", {"train.accumulation": 4}),
            ("vdvae_ffhq256", "v5e-16", {"model.rematerialize": True}),
        ),
    ),
}
GOAL = 10_000_000  # images, whose hours the table of hierarchies has

_TABLE = flags.DEFINE_enum("table", "plans", list(TABLES), "Which one.")
_TOPOLOGIES = flags.DEFINE_list("topologies", None, "What to compile for, of those of the table.")
_CONFIGS = flags.DEFINE_list("configs", None, "What to compile, of the table's.")


def main(arguments: list[str]) -> None:
    """Compiles what is missing, one program after the other."""
    name, of = _TABLE.value, TABLES[_TABLE.value]
    every = [*of.topologies, *(topology for _, topology, _ in of.more)]
    configs, topologies = _CONFIGS.value or list(of.configs), _TOPOLOGIES.value or every
    found, record = environment(), json.loads(of.results.read_text()) if of.results.exists() else {}
    if record.get("commit") != found["commit"]:
        record = {"plans": {}}
    wanted: list[tuple[str, str, dict[str, int | bool]]] = [
        (config, topology, {}) for topology in of.topologies if topology in topologies for config in configs
    ]
    wanted += [each for each in of.more if each[0] in configs and each[1] in topologies]
    for config, topology, settings in wanted:
        named = [f"{key.rpartition('.')[2].removesuffix('_size')} {value}" for key, value in settings.items()]
        label, changed = ", ".join([config, *named]), [f"--config.{key}={value}" for key, value in settings.items()]
        if topology not in record["plans"].setdefault(label, {}):
            record["plans"][label][topology] = plan_of(config, topology, *changed, images=of.configs[config])
            write_json(of.results, {"command": f"python -m benchmarks.plan_table --table={name}", **record, **found})
    start, end, text = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n", PAGE.read_text()
    PAGE.write_text(text.split(start)[0] + start + table(record["plans"], of) + end + text.split(end)[1])


def plan_of(config: str, topology: str, *changed: str, images: int) -> dict[str, Any]:
    """The plan as a dictionary, with some flags more; what does not fit is an `error`."""
    flags_of = [f"--config={config}", f"--topology={topology}", f"--images={images}", "--json", *changed]
    command = [sys.executable, "-m", "facevae_jax.plan", *flags_of]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    print(f"{' '.join((config, topology, *changed))}: exit code {result.returncode}", flush=True)
    if result.returncode and "does not fit" not in result.stderr:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)[0] if not result.returncode else {"error": result.stderr.strip().splitlines()[-1]}


def table(plans: dict[str, Any], of: Table) -> str:
    """Markdown: a line for each config and topology."""
    long = of is TABLES["hierarchies"]
    last = "hours for 10 M images" if long else "minutes"
    lines = [
        f"| config | topology | images each | feed | memory, GiB | sent, MB a step | step | ms | images/s | {last} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for config, by_topology in plans.items():
        for topology, plan in by_topology.items():
            if "error" in plan:
                lines.append(f"| {config} | {topology} | | | does not fit | | | | | |")
                continue
            sent = sum(size for _, size in plan["exchanges"].values()) / 1e6
            milliseconds = 1e3 * plan["estimated_step_seconds"]
            lasts = GOAL / plan["images_per_second"] / 3600 if long else 60 * plan["hours"]
            time = f"{milliseconds:.2f} | {plan['images_per_second']:,.0f} | {lasts:.1f}"
            work = f"{plan['cycles'] / 1e6:.2f} M cycles" if plan["cycles"] else f"{plan['launches']} launches"
            lines.append(
                f"| {config} | {topology} | {plan['images_per_device']:g} | {plan['feed'].partition(':')[0]} "
                f"| {plan['peak_bytes'] / 2**30:.2f} of {plan['memory_bytes'] / 2**30:.1f} | {sent:.1f} | {work} "
                f"| {time} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line.run(main)
