"""Compiles a run for accelerators that need not be there: does it fit, what is sent, how long may it take?

python -m facevae_jax.plan --config=ffhq128 --topology=v5e-4 --compare=8xh100,v6e-4 --images=60000

Topologies: v5e-16, v6e-4, v5p-8, v4-8 and other sizes; 8xh100 (one host), 2x8xh100 (two). The compilers are extras:
pip install "facevae-jax[plan-tpu]" or "facevae-jax[plan-gpu]"; neither needs a driver.
"""

import json
import os
from typing import Any

from absl import flags

from facevae_jax import main as train_command  # defines --config
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.core import command_line
from facevae_jax.core.errors import UserError, expand_home, make_writable_directory

_TOPOLOGY = flags.DEFINE_string("topology", None, "What to compile for, such as v5e-16, v5p-8, 8xh100 or 2x8xh100.")
_COMPARE = flags.DEFINE_list("compare", [], "Other topologies, for a table.")
_IMAGES = flags.DEFINE_integer("images", None, "Training images; the dataset's number by default.", lower_bound=1)
_DUMP = flags.DEFINE_string("dump", None, "Folder for the text of the compiled programs.")
_PRICE = flags.DEFINE_float("price", None, "USD an hour, for all devices, of --topology.", lower_bound=0.0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(arguments: list[str]) -> None:
    """Prints the plans."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: flags look like --name=value.")
    if not flags.FLAGS["config"].present or not _TOPOLOGY.value:
        raise UserError("--config or --topology is missing: give both, such as --config=ffhq128 --topology=v5e-4.")
    config = train_command.read_config()
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is here; the compilers need no device

    from facevae_jax.planning.plans import plan  # only for a valid config: importing JAX takes seconds
    from facevae_jax.planning.topologies import topology_of

    images = _IMAGES.value or images_of(config)
    dump = expand_home(_DUMP.value, name="--dump") if _DUMP.value else None
    if dump:
        make_writable_directory(dump, name="--dump")
    found = []
    for topology in [topology_of(name) for name in dict.fromkeys([_TOPOLOGY.value, *_COMPARE.value])]:
        found.append(plan(config, topology, images=images, dump=dump))
    if _JSON.value:
        print(json.dumps([each.to_dict() for each in found], indent=2))
        return
    for each in found:
        print("\n".join(describe(each)))
    if _PRICE.value is not None:
        print(f"cost on {found[0].topology}: {found[0].hours * _PRICE.value:,.2f} USD at {_PRICE.value:g} an hour")


def images_of(config: RunConfig) -> int:
    """The number of training images, from the dataset's metadata.

    Raises:
      UserError: it is not prepared here.
    """
    from facevae_jax.data.dataset import open_dataset

    try:
        return open_dataset(config.data).sizes["train"]
    except UserError as error:
        raise UserError(f"{error} Or give the number of training images: --images=60000.") from error


def describe(plan: Any) -> list[str]:
    """Lines for a person."""
    gib, mb = 2**30, 1e6
    sent = "; ".join(f"{times} x {kind}, {size / mb:.1f} MB" for kind, (times, size) in plan.exchanges.items())
    work = f"{plan.cycles / 1e6:.2f} M cycles" if plan.cycles else f"{plan.launches} launches"
    work += f"; {plan.flops / 1e9:,.1f} GFLOP; {plan.memory_traffic_bytes / mb:,.0f} MB read and written in memory"
    return [
        f"{plan.topology}: {plan.devices} devices on {plan.hosts} hosts, {plan.images_per_device:g} images each",
        f"  feed       {plan.feed}",
        f"  memory     fits: {plan.argument_bytes / gib:.2f} GiB of arguments, {plan.temporary_bytes / gib:.2f} of "
        f"temporaries, of {plan.memory_bytes / gib:.2f}",
        f"  exchanges  {sent or 'none'} (a device and step)",
        f"  step       {work}",
        f"  estimate   {plan.estimated_step_seconds * 1e3:.2f} ms a step, {plan.images_per_second:,.0f} images/s, "
        f"{duration(plan.hours)} for the schedule ({plan.estimate})",
        f"  compiled   in {plan.compile_seconds:.0f} s",
        *(f"  advice     {line}" for line in plan.advice),
    ]


def duration(hours: float) -> str:
    """In hours, minutes or seconds."""
    for unit, per_hour in (("hours", 1), ("minutes", 60)):
        if hours * per_hour >= 1:
            return f"{hours * per_hour:.3g} {unit}"
    return f"{hours * 3600:.3g} seconds"


if __name__ == "__main__":
    command_line.run(main, check_arguments=check_overrides)
