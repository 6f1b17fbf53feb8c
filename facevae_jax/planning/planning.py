"""Compiles the steps of a run for a topology and says what they need: whether they fit, how long they may take."""

import dataclasses
import math
import pathlib
import re
import sys
import time
from typing import Any, cast

import jax

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.plan import steps_per_epoch
from facevae_jax.planning import programs
from facevae_jax.planning.topologies import GIB, Topology
from facevae_jax.training.feeds import check_batch_size, feed_spec
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from facevae_jax.training.step import compile_train_steps

TPU_LANES = 128  # in which the images of a batch lie
LAUNCH_SECONDS = 2e-6  # of a kernel on a GPU, at the least


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled run needs and does, on each device and for each step."""

    topology: str
    devices: int
    hosts: int
    images: int  # of the training split
    images_per_device: float  # of a batch
    feed: str
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    memory_bytes: int  # of the device
    exchanges: dict[str, tuple[int, int]]  # by kind: how many a step, bytes
    memory_traffic_bytes: int
    cycles: int  # of a step by the TPU's compiler, without exchanges; 0 of a GPU
    launches: int  # of a step, on a GPU; 0 of a TPU
    estimated_step_seconds: float
    estimate: str  # what that is
    images_per_second: float
    hours: float  # of the config's schedule
    compile_seconds: float
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def plan(config: RunConfig, topology: Topology, *, images: int, dump: pathlib.Path | None = None) -> Plan:
    """Compiles the steps of `config` for `topology`; `dump` is an existing folder for the program's text.

    Raises:
      UserError: it does not fit, or the batch cannot be cut.
    """
    mesh = make_mesh(topology.devices)
    check_batch_size(config, mesh)
    epoch = steps_per_epoch(images, config.train.batch_size)
    if not epoch:
        raise UserError(f"config.train.batch_size={config.train.batch_size} is more than the {images} images.")
    steps = config.train.steps or epoch * config.train.epochs
    setup = TrainSetup.of(config, mesh, total_steps=steps)
    spec, reason = feed_spec(config, images, mesh, budget=int(topology.chip.memory / 2))
    print(f"compiling for {topology.name}: seconds (GPU) or minutes (TPU) ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        compiled = compile_train_steps(setup, abstract_state(setup), spec)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(config, topology, str(error)) from error
    seconds = time.perf_counter() - started
    text, memory = compiled.as_text() or "", cast(Any, compiled.memory_analysis())
    if dump:
        (dump / f"{topology.name}.txt").write_text(text)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if peak > topology.chip.memory:
        raise _too_large(config, topology, f"it takes {peak / GIB:.1f} GiB of {topology.chip.memory / GIB:.1f}.")
    program = programs.parse(text)
    cycles, once = programs.cycles(program)
    share, pixels = config.train.batch_size / mesh.size, spec.abstract_chunk().pixels
    on_a_device = () if isinstance(pixels, tuple) else pixels.sharding.shard_shape(pixels.shape)
    traffic = programs.traffic(program, split=on_a_device)
    if topology.platform == "tpu":
        step_seconds = (cycles + once / spec.capacity) / topology.chip.clock
        estimate = "the compiler's cycles; without exchanges and without waiting for memory"
        launches = 0
    else:
        launches = programs.launches(program)
        step_seconds = max(traffic / topology.chip.bandwidth, launches * LAUNCH_SECONDS)
        estimate = "a bound: memory traffic at full bandwidth, or 2 us a launch; without exchanges"
    return Plan(
        topology=topology.name,
        devices=mesh.size,
        hosts=topology.hosts,
        images=images,
        images_per_device=share,
        feed=f"{spec.kind}: {reason}",
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        memory_bytes=int(topology.chip.memory),
        exchanges=programs.exchanges(program),
        memory_traffic_bytes=traffic,
        cycles=cycles,
        launches=launches,
        estimated_step_seconds=step_seconds,
        estimate=estimate,
        images_per_second=config.train.batch_size / step_seconds,
        hours=steps * step_seconds / 3600,
        compile_seconds=seconds,
        advice=advice(config, topology, devices=mesh.size, feed=spec.kind),
    )


def _too_large(config: RunConfig, topology: Topology, reason: str) -> UserError:
    """An error whose remedy is half of what a device has at a time."""
    found = re.search(r"RESOURCE_EXHAUSTED: (.*?)(?:\n|$)", reason)
    parts = 2 * config.train.accumulation
    remedy = f"--config.train.batch_size={config.train.batch_size // 2} or --config.train.accumulation={parts}"
    return UserError(f"it does not fit on {topology.name}: {(found[1] if found else reason)[:200]} Take {remedy}.")


def advice(config: RunConfig, topology: Topology, *, devices: int, feed: str) -> tuple[str, ...]:
    """What would make the run faster."""
    batch, found = config.train.batch_size, []
    share = batch // config.train.accumulation / devices
    if topology.platform == "tpu" and share % TPU_LANES:
        near = max(1, round(share / TPU_LANES)) * TPU_LANES * devices * config.train.accumulation
        found.append(
            f"{share:g} images a device leave some of its {TPU_LANES} lanes empty: "
            f"--config.train.batch_size={near}, with a learning rate for it"
        )
    if batch % (devices * config.train.accumulation):
        found.append(f"the batch is filled up to {math.ceil(share) * devices * config.train.accumulation} images")
    if topology.platform == "tpu" and getattr(config.model, "dtype", "") == "float32":
        found.append("products are of bfloat16 in float32 too; --config.model.dtype=bfloat16 halves the memory")
    if feed == "streamed":
        found.append("the images do not fit in the devices' memory: hosts send each batch")
    return tuple(found)
