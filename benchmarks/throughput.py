"""Measures how fast the project is on this machine, part by part, and writes one JSON file.

python -m benchmarks.throughput --suite=step,input --config=configs/gdl128.py --json=/tmp/throughput.json

Suites: step, input, end_to_end, sampling, compile and peers; `all` means all but peers. Settings of the config are
overridden as in facevae_jax.main: --config.train.batch_size=64.
"""

import dataclasses
import gc
import importlib
import json
import os
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks.environment import REPOSITORY, environment, without_paths
from benchmarks.suites.timing import Options
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home, make_writable_directory
from facevae_jax.core.files import write_json

# In the order in which they run: the first ones start processes, which need the accelerator's memory before this
# process uses it.
SUITES = ("peers", "compile", "step", "input", "end_to_end", "sampling")


def main(arguments: list[str]) -> None:
    """Runs the suites one after the other; the file is written after each, so that a crash loses only one."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --suite={arguments[0]}.")
    values = flags.FLAGS
    names = [name for name in SUITES if name in values.suite or ("all" in values.suite and name != "peers")]
    if "peers" not in names:  # whose processes start as their own commands do
        startup.use_huge_pages()
    try:
        config = RunConfig.from_config_dict(values.config)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(command_line.one_line(error)) from error
    startup.use_cores(config.train.batch_size // config.train.accumulation)  # as main does
    options = Options(config=config, **{name: getattr(values, name) for name in ("rounds", "seconds", "images")})
    path = expand_home(values.json, name="--json") if values.json else None
    if path is not None:
        make_writable_directory(path.parent, name="--json's directory")
    # Suites start commands of their own, which need room on the accelerator beside this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings = dataclasses.asdict(options) | {"config": without_paths(options.config.to_dict())}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        record = records[name] = importlib.import_module(f"benchmarks.suites.{name}").run(options)
        jax.clear_caches()  # frees what the suite left in memory, so that suites do not affect each other
        gc.collect()
        medians = {key: value for key, value in record.items() if key != "all" and not key.endswith("_all")}
        print(f"\n{name}: {json.dumps(medians, indent=2)}", flush=True)
        if path is not None:
            write_json(path, {"suites": records, "settings": settings, **environment()})


if __name__ == "__main__":
    default = str(REPOSITORY / "configs" / "gdl128.py")
    config_flags.DEFINE_config_file("config", default, "A config, with overrides as --config.x.y=value.")
    flags.DEFINE_list("suite", [], f"comma-separated names of {', '.join(SUITES)}; or all")
    known = (*SUITES, "all")
    flags.register_validator(
        "suite", lambda names: names and set(names) <= set(known), f"choose from {', '.join(known)}"
    )
    flags.DEFINE_string("json", None, "file to write; without it the figures are only printed")
    flags.DEFINE_integer("rounds", Options.rounds, "timings of each case", lower_bound=1)
    flags.DEFINE_float("seconds", Options.seconds, "one timing, about", lower_bound=1e-3)
    flags.DEFINE_integer("images", Options.images, "images that input and end_to_end read", lower_bound=1)
    command_line.run(main, check_arguments=check_overrides)
