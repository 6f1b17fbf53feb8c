"""Measures how fast the project is on this machine, part by part, and writes one JSON file.

python -m benchmarks.throughput --suite=step,input --config=configs/gdl128.py --json=/tmp/throughput.json

Suites: step, roofline, input, end_to_end, sampling, growth, compile, prepare and peers; `all` is all but peers. Any
setting of the config is overridden by its path, as in facevae_jax.main: --config.model.dropout_rate=0.
"""

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from benchmarks.environment import REPOSITORY, environment
from benchmarks.suites.options import Options, Skipped
from facevae_jax import command_line, startup
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.errors import UserError, expand_home, make_writable_directory
from facevae_jax.files import write_json

# In the order in which they run: the first ones start processes, which get the accelerator and the memory to themselves
# as long as this one has not used them.
SUITES = ("peers", "prepare", "compile", "step", "roofline", "input", "end_to_end", "sampling", "growth")
ALL = tuple(name for name in SUITES if name != "peers")  # its packages are large, and it takes long
OWN = ("benchmarks", "configs", "facevae_jax")


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    config = str(REPOSITORY / "configs" / "gdl128.py")
    config_flags.DEFINE_config_file("config", config, "A file of configs/, with overrides as --config.x.y=value.")
    flags.DEFINE_list("suite", None, f"names with commas between them, of {', '.join(SUITES)}; or all")
    flags.DEFINE_string("json", None, "file to write; without it there are only the tables")
    flags.DEFINE_integer("rounds", Options.rounds, "timings of each case", lower_bound=1)
    flags.DEFINE_float("seconds", Options.seconds, "one timing, about", lower_bound=1e-3)
    flags.DEFINE_integer("images", Options.images, "images that input and end_to_end read", lower_bound=1)
    flags.DEFINE_string("source", None, "prepare: a folder of images; without it, files that it writes itself")
    flags.DEFINE_string("layout", Options.layout, "prepare: what the source looks like, as in facevae_jax.prepare")


def main(arguments: list[str]) -> None:
    """Runs the suites one after the other; the file is written after each, so that a crash loses one."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --suite={arguments[0]}.")
    values = flags.FLAGS
    names = suite_names(values.suite or [])
    if "peers" not in names:  # whose processes each start as their own commands do
        startup.use_huge_pages()
    options = Options(
        config=read_config(values.config),
        rounds=values.rounds,
        seconds=values.seconds,
        images=values.images,
        source=expand_home(values.source, name="--source").absolute() if values.source else None,
        layout=values.layout,
    )
    path = expand_home(values.json, name="--json") if values.json else None
    if path is not None:
        make_writable_directory(path.parent, name="--json's directory")
    # Suites start commands of their own, which need room on the accelerator beside this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        records[name] = run_suite(name, options)
        print("\n".join(table(name, records[name])), flush=True)
        if path is not None:
            write_json(path, document(records, options))


def suite_names(given: list[str]) -> tuple[str, ...]:
    """The suites to run, each once, in the order of `SUITES`.

    Raises:
      UserError: none is given, or one is unknown.
    """
    known = f"choose from {', '.join(SUITES)}, or all"
    if not given:
        raise UserError(f"--suite is missing: {known}.")
    unknown = [name for name in given if name not in (*SUITES, "all")]
    if unknown:
        raise UserError(f"--suite={unknown[0]}: there is no such suite: {known}.")
    wanted = {*given, *(ALL if "all" in given else ())}
    return tuple(name for name in SUITES if name in wanted)


def read_config(config: Mapping[str, Any]) -> RunConfig:
    """The checked config.

    Raises:
      UserError: a key or value is impossible.
    """
    try:
        return RunConfig.from_config_dict(config)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(command_line.one_line(error)) from error


def run_suite(name: str, options: Options) -> dict[str, Any]:
    """The suite's record; {"skipped": reason} and a line on standard error where it cannot run on this machine."""
    try:
        return importlib.import_module(f"benchmarks.suites.{name}").run(options)
    except Skipped as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN:
            raise
        reason = f"needs the package {package}"
    finally:
        release()
    print(f"{name}: skipped: {reason}", file=sys.stderr)
    return {"skipped": reason}


def release() -> None:
    """Gives back what a suite has left in memory, so that none depends on those before it."""
    import jax

    jax.clear_caches()
    gc.collect()


def document(records: Mapping[str, dict[str, Any]], options: Options) -> dict[str, Any]:
    """What the file holds; the fields of a single suite are at the top too."""
    single = next(iter(records.values())) if len(records) == 1 else {}
    config = options.config.to_dict()
    config["data"].pop("data_dir")  # a path of one machine
    settings = {"rounds": options.rounds, "seconds": options.seconds, "images": options.images, "config": config}
    return {**single, "suites": dict(records), "settings": settings, **environment()}


def table(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """The record as lines to read: the median figures, without all their repetitions."""
    yield f"\n{name}: {record.get('what', '')}"
    rows = list(cells(record))
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        yield f"  {label:<{width}}  {value}"


def cells(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Label and value of every figure, with the names of nested ones joined by dots."""
    for key, value in record.items():
        label = f"{prefix}{key}"
        if key == "what" or key == "all" or key.endswith("_all"):
            continue
        if isinstance(value, Mapping):
            yield from cells(value, f"{label}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for point in value:  # of a series
                yield f"{label}={point['x']}", f"{show(point['images_per_second'])} images/s"
        elif isinstance(value, list):
            yield label, ", ".join(map(show, value))
        else:
            yield label, show(value)


def show(value: Any) -> str:
    """A figure with four digits, or with all those before the point."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "unknown" if value is None else f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, check_arguments=check_overrides)
