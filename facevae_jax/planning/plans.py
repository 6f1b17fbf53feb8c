"""Compiles the steps of a run for a topology and says what they need: whether they fit, how long they may take."""

import dataclasses
import functools
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.batches import Batch
from facevae_jax.data.feed import FeedSpec
from facevae_jax.data.plan import steps_per_epoch
from facevae_jax.planning import programs
from facevae_jax.planning.topologies import GIB, Topology
from facevae_jax.training.feeds import check_batch_size, feed_spec
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from facevae_jax.training.step import compile_train_steps, train_step

TPU_LANES = 128  # in which the images of a batch lie
TPU_IMAGES = 512  # a device; with more the activations leave the memory of its cores, and images take longer
LAUNCH_SECONDS = 2e-6  # of a kernel on a GPU, at the least
ROOMY, TIGHT = 0.4, 0.85  # of a device's memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled run needs and does, on each device and for each step."""

    topology: str
    devices: int
    hosts: int
    images: int  # of the training split
    batch_size: int
    steps: int  # of the config's schedule
    feed: str
    argument_bytes: int
    temporary_bytes: int
    memory_bytes: int  # of the device
    exchanges: dict[str, tuple[int, int]]  # by kind: how many a step, bytes
    flops: float  # before the compiler's changes
    memory_traffic_bytes: int
    cycles: int  # of a step by the TPU's compiler, without exchanges; 0 of a GPU
    launches: int  # of a step, on a GPU; 0 of a TPU
    estimated_step_seconds: float
    estimate: str  # what that is
    compile_seconds: float
    advice: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Arguments and temporaries together."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def images_per_device(self) -> float:
        """Of a batch."""
        return self.batch_size / self.devices

    @property
    def images_per_second(self) -> float:
        """By the estimate."""
        return self.batch_size / self.estimated_step_seconds

    @property
    def hours(self) -> float:
        """By the estimate, for the config's schedule."""
        return self.steps * self.estimated_step_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("peak_bytes", "images_per_device", "images_per_second", "hours")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class Compiled(NamedTuple):
    """The program of a run's steps."""

    spec: FeedSpec
    reason: str  # for the feed
    text: str
    argument_bytes: int
    temporary_bytes: int
    seconds: float  # that compiling took


class DoesNotFit(Exception):
    """The program needs `times` as much memory as a device has; the message says how much."""

    def __init__(self, message: str, times: float = 1.0) -> None:
        super().__init__(message)
        self.times = times


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
    try:
        compiled = compile_for(config, topology, images=images)
    except DoesNotFit as error:
        remedy = nearest_that_fits(config, topology, images=images, times=error.times)
        raise UserError(f"it does not fit on {topology.name}: {error} {remedy}") from error
    if dump:
        (dump / f"{topology.name}.txt").write_text(compiled.text)
    program, pixels = programs.parse(compiled.text), compiled.spec.abstract_chunk().pixels
    split = () if isinstance(pixels, tuple) else pixels.sharding.shard_shape(pixels.shape)
    flops = step_flops(config, devices=mesh.size)
    traffic = programs.traffic(program, split=split)
    cycles, once = programs.cycles(program)
    launches = 0 if cycles else programs.launches(program)
    if cycles:
        seconds = (cycles + once / compiled.spec.capacity) / topology.chip.clock
        estimate = "the compiler's cycles; without exchanges and without waiting for memory"
    else:
        bounds = (traffic / topology.chip.bandwidth, flops / topology.chip.flops, launches * LAUNCH_SECONDS)
        seconds = max(bounds)
        estimate = "a bound: traffic at full bandwidth, arithmetic at full speed or 2 us a launch; without exchanges"
    found = Plan(
        topology=topology.name,
        devices=mesh.size,
        hosts=topology.hosts,
        images=images,
        batch_size=config.train.batch_size,
        steps=config.train.steps or epoch * config.train.epochs,
        feed=f"{compiled.spec.kind}: {compiled.reason}",
        argument_bytes=compiled.argument_bytes,
        temporary_bytes=compiled.temporary_bytes,
        memory_bytes=int(topology.chip.memory),
        exchanges=programs.exchanges(program),
        flops=flops,
        memory_traffic_bytes=traffic,
        cycles=cycles,
        launches=launches,
        estimated_step_seconds=seconds,
        estimate=estimate,
        compile_seconds=compiled.seconds,
        advice=(),
    )
    return dataclasses.replace(found, advice=advice(config, topology, found))


def compile_for(config: RunConfig, topology: Topology, *, images: int) -> Compiled:
    """The compiled steps.

    Raises:
      DoesNotFit: they need more memory than a device has.
    """
    mesh = make_mesh(topology.devices)
    setup = TrainSetup.of(config, mesh, total_steps=max(1, config.train.steps))
    spec, reason = feed_spec(config, images, mesh, budget=int(topology.chip.memory / 2))
    batch, parts = config.train.batch_size, config.train.accumulation
    print(
        f"compiling for {topology.name}, {batch} images in {parts} parts: seconds (GPU) or minutes (TPU) ...",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    try:
        compiled = compile_train_steps(setup, abstract_state(setup), spec)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"RESOURCE_EXHAUSTED: (.*?)(?:\n|$)", str(error))
        needed = re.search(r"\(([\d.]+)G\) exceeds available \w+ \(([\d.]+)G\)", str(error))
        times = float(needed[1]) / float(needed[2]) if needed else 1.0
        raise DoesNotFit((found[1] if found else "the compiler ran out of memory.")[:200], times) from error
    seconds = time.perf_counter() - started
    memory = cast(Any, compiled.memory_analysis())
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if peak > topology.chip.memory:
        message = f"it takes {peak / GIB:.1f} GiB of {topology.chip.memory / GIB:.1f}."
        raise DoesNotFit(message, peak / topology.chip.memory)
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    return Compiled(spec, reason, compiled.as_text() or "", *sizes, seconds)


def nearest_that_fits(config: RunConfig, topology: Topology, *, images: int, times: float) -> str:
    """A remedy that was compiled: more parts of the batch, activations that are computed again, or a smaller batch.

    What takes `times` the memory of a device does not fit in less than half as many parts.
    """
    batch, parts, devices = config.train.batch_size, config.train.accumulation, len(topology.devices)
    powers = range(max(1, math.floor(math.log2(times))), 16)
    cuts = [parts * 2**power for power in range(16) if batch % (parts * 2**power) == 0]
    cuts = [each for each in cuts if batch // each >= devices]
    tries: list[dict[str, Any]] = [{"train.accumulation": each} for each in cuts if each >= parts * 2**powers.start]
    if getattr(config.model, "rematerialize", None) is False:
        again = {"model.rematerialize": True}
        tries += [again | ({"train.accumulation": each} if each > parts else {}) for each in cuts]
    smaller = [batch // 2**power // parts * parts for power in powers]
    least = batch // max(cuts, default=parts)  # images of a part that was tried
    tries += [{"train.batch_size": each} for each in smaller if devices * parts <= each < least * parts]
    for settings in tries:
        try:
            compile_for(changed(config, settings), topology, images=images)
        except DoesNotFit:
            continue
        return f"This fits: {' '.join(f'--config.{key}={value}' for key, value in settings.items())}."
    return "Nor does a smaller batch: take more devices or a smaller network."


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with some settings, such as {"train.accumulation": 2}, changed."""
    for key, value in settings.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def step_flops(config: RunConfig, *, devices: int) -> float:
    """Additions and multiplications of a step on a device, as XLA counts them before it changes the program."""
    share = max(1, config.train.batch_size // devices)
    train = dataclasses.replace(config.train, batch_size=share, accumulation=1, convolution="plain")
    setup = TrainSetup.of(dataclasses.replace(config, train=train), make_mesh(jax.devices()[:1]))
    batch: Any = Batch(
        cast(Any, jax.ShapeDtypeStruct((share, *setup.model.image_shape), jnp.uint8)),
        cast(Any, jax.ShapeDtypeStruct((share,), jnp.int32)),
    )
    step = jax.make_jaxpr(functools.partial(train_step, setup=setup))(abstract_state(setup), batch)
    return _flops(step)


def _flops(program: ClosedJaxpr) -> float:
    """XLA counts the body of a loop once, whatever the number of its turns."""
    arguments = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in program.jaxpr.invars]
    found = float((jax.jit(jaxpr_as_fun(program)).lower(*arguments).cost_analysis() or {}).get("flops", 0.0))
    for equation in _loops(program.jaxpr):
        found += (equation.params["length"] - 1) * _flops(equation.params["jaxpr"])
    return found


def _loops(program: Jaxpr) -> Iterator[JaxprEqn]:
    """The scans of a program that are within no other scan."""
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            for inner in jax.tree.leaves(list(equation.params.values())):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from _loops(inner if isinstance(inner, Jaxpr) else inner.jaxpr)


def advice(config: RunConfig, topology: Topology, plan: Plan) -> tuple[str, ...]:
    """What would make the run faster or safer."""
    train, found = config.train, []
    batch, parts, devices = train.batch_size, train.accumulation, plan.devices
    share, used = batch // parts / devices, plan.peak_bytes / plan.memory_bytes
    on_tpu = topology.platform == "tpu"
    if on_tpu and share % TPU_LANES:
        lanes = round(share / TPU_LANES) or 1
        if plan.argument_bytes + plan.temporary_bytes * lanes * TPU_LANES / share > plan.memory_bytes:
            lanes = int(share / TPU_LANES)  # temporaries grow with the images
        remedy = f"--config.train.batch_size={lanes * TPU_LANES * devices * parts}, with a learning rate for it"
        found.append(
            f"{share:g} images a device leave some of its {TPU_LANES} lanes empty: "
            + (remedy if lanes else "there is no memory for more")
        )
    elif on_tpu and share > TPU_IMAGES and not batch % (2 * parts * devices):
        smaller = f"--config.train.accumulation={2 * parts}"
        found.append(f"{share:g} images a device take more memory traffic each than {share / 2:g}: {smaller}")
    if not on_tpu and plan.launches * LAUNCH_SECONDS >= plan.estimated_step_seconds and used < ROOMY:
        found.append(
            f"{share:g} images a device are fewer than a GPU's launches last: "
            f"--config.train.batch_size={2 * batch}, with a learning rate for it"
        )
    if parts > 1 and used < ROOMY:
        found.append(f"there is memory for larger parts: --config.train.accumulation={max(1, parts // 2)}")
    if used > TIGHT:
        found.append(f"{used:.0%} of the memory is taken: --config.train.accumulation={2 * parts} takes less")
    if batch % (devices * parts):
        found.append(f"the batch is filled up to {math.ceil(share) * devices * parts} images")
    if not on_tpu and getattr(config.model, "dtype", "") == "float32":
        found.append("--config.model.dtype=auto computes in bfloat16, with half the memory traffic")
    if plan.feed.startswith("streamed"):
        found.append("the images do not fit in the devices' memory: hosts send each batch")
    return tuple(found)
