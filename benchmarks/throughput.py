"""Measures how fast training, and what belongs to it, is on this machine.

    python -m benchmarks.throughput --suite=step,input --config.model.dropout_rate=0 --json=/tmp/throughput.json

Suites: peers (other trainers; not in `all`), prepare, compile, step, input, end_to_end, sampling, roofline, growth.
Any setting of --config is overridden by its path, as in facevae_jax.main.
"""

import importlib
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from benchmarks import tables
from benchmarks.environment import REPOSITORY, environment
from benchmarks.suites.options import Options
from facevae_jax import command_line, startup
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.errors import UserError
from facevae_jax.files import write_json

# In the order in which they run: the first ones start processes, which want an accelerator that jax does not yet hold
# in this one, and a memory of this process without jax.
SUITES = ("peers", "prepare", "compile", "step", "input", "end_to_end", "sampling", "roofline", "growth")
WITHOUT_JAX = SUITES[:3]
ALL = "all"
NOT_IN_ALL = ("peers",)  # needs PyTorch, Keras and pythae, and takes as long as all others


def define_flags() -> None:
    """Defines the flags; not at import, since the processes of the suite `prepare` import this module too."""
    preset = str(REPOSITORY / "configs" / "gdl128.py")
    config_flags.DEFINE_config_file("config", preset, "A file of configs/, with overrides as --config.x.y=value.")
    flags.DEFINE_list("suite", [ALL], f"Suites to run: {', '.join(SUITES)}, or all (but {', '.join(NOT_IN_ALL)}).")
    flags.DEFINE_string("json", None, "JSON file to write.")
    flags.DEFINE_integer("rounds", 3, "Timings of each case.", lower_bound=1)
    flags.DEFINE_float("seconds", 5.0, "One timing, about.", lower_bound=0.01)
    flags.DEFINE_string("source", None, "For prepare: the folder of the images, in place of files made for it.")
    flags.DEFINE_string("layout", "folder", "For prepare: what the source looks like.")


def main(arguments: list[str]) -> None:
    """Runs the suites, prints their tables and writes the record."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood: flags look like --name=value.")
    values = flags.FLAGS
    names = choose_suites(values.suite)
    options = Options(
        config=read_config(values.config),
        rounds=values.rounds,
        seconds=values.seconds,
        source=values.source,
        layout=values.layout,
    )
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in WITHOUT_JAX:
            startup.keep_compiled_programs()  # as a training does
        records[name] = run_suite(name, options)
        if values.json:  # after each: what has been measured outlives a crash
            write_json(pathlib.Path(values.json), combine(records))


def choose_suites(given: list[str]) -> list[str]:
    """The named suites, each once, in the order in which they run.

    Raises:
      UserError: one is unknown.
    """
    unknown = [name for name in given if name not in (*SUITES, ALL)]
    if unknown or not given:
        raise UserError(f"--suite={','.join(given)}: choose from {', '.join(SUITES)}, or {ALL}.")
    wanted = {name for name in SUITES if name not in NOT_IN_ALL} if ALL in given else set()
    return [name for name in SUITES if name in wanted | set(given)]


def read_config(config: Any) -> RunConfig:
    """The checked config.

    Raises:
      UserError: a key or a value is impossible.
    """
    try:
        return RunConfig.from_config_dict(config)
    except (TypeError, ValueError) as error:
        raise UserError(command_line.one_line(error)) from error


def run_suite(name: str, options: Options) -> dict[str, Any]:
    """The record of one suite, which is printed too; {"skipped": reason} if it cannot run here."""
    try:
        record: dict[str, Any] = importlib.import_module(f"benchmarks.suites.{name}").run(options)
    except (ImportError, UserError) as error:
        reason = command_line.one_line(error)
        print(f"{name}: skipped: {reason}", flush=True)
        return {"skipped": reason}
    print(f"\n{name}: {record['what']}\n{tables.text(tables.table(name, record))}", flush=True)
    for note in record.get("notes", []):
        print(f"note: {note}", flush=True)
    return record


def combine(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds; of a single suite, its fields stand at the top as well."""
    single = next(iter(records.values())) if len(records) == 1 else {}
    return {**single, "suites": records, **environment()}


if __name__ == "__main__":
    define_flags()
    startup.use_huge_pages()
    command_line.run(main, check_arguments=check_overrides)
