"""Which feed a run gets, and whether its batches can be cut up for the devices."""

import math

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from facevae_jax.config import RunConfig
from facevae_jax.core import hosts
from facevae_jax.core.errors import UserError
from facevae_jax.core.settings import CHANNELS
from facevae_jax.data.exchange import can_exchange
from facevae_jax.data.feed import Feed, FeedSpec, Kind, ResidentFeed, StreamedFeed, device_memory_budget
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.telemetry import log

# How to compute on fewer devices, by platform; elsewhere on a smaller slice.
FEWER_DEVICES = {"cpu": "set JAX_NUM_CPU_DEVICES={}", "gpu": "name {} in CUDA_VISIBLE_DEVICES"}


def check_batch_size(config: RunConfig, mesh: Mesh, *, resumes: bool = False) -> None:
    """Raises a UserError unless each part of a batch has at least one image for each device.

    A part that the devices do not divide is filled up with images that do not count. A run that resumes keeps its
    batch size, so that its remedy is another.
    """
    devices, batch_size, parts = mesh.size, config.train.batch_size, config.train.accumulation
    if batch_size // parts >= devices:
        return
    if batch_size >= devices:
        fewer = next(n for n in range(parts, 0, -1) if batch_size % n == 0 and batch_size // n >= devices)
        remedy = f"take --config.train.accumulation={fewer}"
    elif resumes:
        remedy = f"a run keeps its batch size: {_on_fewer_devices(batch_size, mesh)}"
    else:
        remedy = f"take --config.train.batch_size={devices}"
        remedy += " --config.train.accumulation=1" * (parts > 1)
    of = f" in each of the {parts} parts of config.train.accumulation" if parts > 1 else ""
    raise UserError(
        f"config.train.batch_size={batch_size} is less than one image for each of the {devices} devices{of}: {remedy}."
    )


def _on_fewer_devices(count: int, mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return FEWER_DEVICES.get(platform, "take a slice of {} chips or fewer").format(count)


def check_split_size(config: RunConfig, images: int, mesh: Mesh, *, resumes: bool = False) -> None:
    """Raises a UserError unless the training images make at least one batch."""
    batch_size, parts = config.train.batch_size, config.train.accumulation
    if batch_size <= images:
        return
    if resumes:
        remedy = "a run keeps its batch size: put the images back, or take a new workdir"
    elif images < mesh.size:
        remedy = f"{mesh.size} devices need at least as many: add some, or {_on_fewer_devices(images, mesh)}"
    else:
        largest = images // mesh.size * mesh.size
        remedy = f"take --config.train.batch_size={largest}"
        remedy += " --config.train.accumulation=1" * (parts > 1)
    raise UserError(f"config.train.batch_size={batch_size} is more than the {images} training images: {remedy}.")


def make_feed(config: RunConfig, images: UInt8[np.ndarray, "n h w c"], mesh: Mesh, *, first_step: int) -> Feed:
    """The feed that the config forces, or the fastest that the training split fits: see `choose_feed`."""
    (negative_budget,) = hosts.agree(-device_memory_budget())  # the smallest, or processes would choose differently
    spec, reason = feed_spec(config, len(images), mesh, budget=-int(negative_budget))
    log(f"feed: {spec.kind}; {len(images):,} images: {reason}")
    if spec.kind == "streamed":
        return StreamedFeed(images, spec, first=first_step)
    return ResidentFeed(images, spec)


def feed_spec(config: RunConfig, images: int, mesh: Mesh, *, budget: int) -> tuple[FeedSpec, str]:
    """What feed a run gets and why, given the number of its training images and a device's bytes for them."""
    train, shape = config.train, (config.data.resolution, config.data.resolution, CHANNELS)
    slices = can_exchange(mesh)
    if config.data.feed == "sharded" and not slices:
        raise UserError(
            f"config.data.feed='sharded': {mesh.size} chips of {mesh.devices.flat[0].device_kind} cannot exchange "
            "images: take --config.data.feed=streamed."
        )
    # A CPU's devices have one memory, where a slice for each saves nothing.
    cut = mesh.size if slices and mesh.devices.flat[0].platform != "cpu" else 1
    kind, reason = choose_feed(images * math.prod(shape), budget=budget, devices=cut)
    if config.data.feed != "auto":
        kind, reason = config.data.feed, f"as config.data.feed says, though {kind} would be chosen ({reason})"
    plan = BatchPlan(train.seed, images, train.batch_size)
    spec = FeedSpec.of(kind, plan, shape, mesh, capacity=train.steps_per_dispatch, parts=train.accumulation)
    return spec, reason


def choose_feed(size: int, *, budget: int, devices: int) -> tuple[Kind, str]:
    """The fastest feed that a split of `size` bytes fits, and why, given the bytes that a device has for it."""
    given, slice_size = f"{size / 2**20:,.0f} MiB, {budget / 2**20:,.0f} MiB a device", -(-size // devices)
    if size <= budget:
        return "resident", f"{given}, into which all fit"
    if slice_size <= budget:
        return "sharded", f"{given}, into which a slice of {slice_size / 2**20:,.0f} MiB fits"
    return "streamed", f"{given}, which even a slice of {slice_size / 2**20:,.0f} MiB exceeds"
