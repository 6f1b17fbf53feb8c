"""Which feed a run gets, and whether its batches can be cut up for the devices."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from facevae_jax.config import RunConfig
from facevae_jax.core import hosts
from facevae_jax.core.errors import UserError
from facevae_jax.data.feed import Feed, ResidentFeed, StreamedFeed, device_memory_budget
from facevae_jax.data.plan import BatchPlan
from facevae_jax.training.setup import replicated, split_along
from facevae_jax.training.telemetry import log


def check_batch_size(config: RunConfig, mesh: Mesh) -> None:
    """Raises a UserError unless the global batch, or each of its parts, can be cut evenly among the devices."""
    devices, batch_size, parts = mesh.size, config.train.batch_size, config.train.accumulation
    if batch_size % (devices * parts):
        near = max(1, round(batch_size / (devices * parts))) * devices * parts
        cut = f"the {devices} devices" + (f" x {parts} parts of config.train.accumulation" if parts > 1 else "")
        raise UserError(
            f"config.train.batch_size={batch_size} is not divisible by {cut}: take --config.train.batch_size={near}."
        )


def check_split_size(config: RunConfig, images: int, mesh: Mesh) -> None:
    """Raises a UserError unless the training images make at least one batch."""
    if config.train.batch_size > images:
        largest = images // mesh.size * mesh.size
        remedy = (
            f"take --config.train.batch_size={largest}" if largest else f"{mesh.size} devices need at least as many"
        )
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} is more than the {images} training images: {remedy}."
        )


def make_feed(config: RunConfig, images: UInt8[np.ndarray, "n h w c"], mesh: Mesh, *, first_step: int) -> Feed:
    """The feed that the config forces, or the fastest that the training split fits: see `choose_feed`."""
    train = config.train
    plan = BatchPlan(train.seed, len(images), train.batch_size)
    (negative_budget,) = hosts.agree(-device_memory_budget())  # the smallest, or processes would choose differently
    kind, reason = choose_feed(images.nbytes, budget=-int(negative_budget), devices=mesh.size)
    if config.data.feed != "auto":
        kind, reason = config.data.feed, f"as config.data.feed says, though {kind} would be chosen ({reason})"
    log(f"feed: {kind}; {len(images):,} images: {reason}")
    rows = split_along(mesh, 1)
    if kind == "streamed":
        batches = split_along(mesh, 0)
        of = {"capacity": train.steps_per_dispatch, "first": first_step}
        return StreamedFeed(images, plan, batch_sharding=batches, rows_sharding=rows, **of)
    pixels = split_along(mesh, 0) if kind == "sharded" else replicated(mesh)
    return ResidentFeed(images, plan, capacity=train.steps_per_dispatch, pixels_sharding=pixels, rows_sharding=rows)


def choose_feed(size: int, *, budget: int, devices: int) -> tuple[str, str]:
    """The fastest feed that a split of `size` bytes fits, and why, given the bytes that a device has for it."""
    given, slice_size = f"{size / 2**20:,.0f} MiB, {budget / 2**20:,.0f} MiB a device", -(-size // devices)
    if size <= budget:
        return "resident", f"{given}, into which all fit"
    if slice_size <= budget:
        return "sharded", f"{given}, into which a slice of {slice_size / 2**20:,.0f} MiB fits"
    return "streamed", f"{given}, which even a slice of {slice_size / 2**20:,.0f} MiB exceeds"
