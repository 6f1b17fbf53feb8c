"""How devices that each hold a slice of a split give each other the images of a batch: each sends and gets its share.

The host knows the rows of a step, so the host computes what goes where, and the compiled program only gathers from its
slice and exchanges. What a device sends does not depend on how many others there are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Int, Shaped

from facevae_jax.core.errors import UserError
from facevae_jax.data.plan import PADDING


class Routes(NamedTuple):
    """What each device sends for each batch of a dispatch, and where it finds what it gets."""

    send: Shaped[Any, "k d capacity"]  # rows of the device's slice, those for the first device first
    runs: Shaped[Any, "k d 4 d"]  # of each peer: where its rows start in `send`, how many; where they arrive, how many
    place: Shaped[Any, "k b"]  # of each image of a device's part of the batch, in what arrives


def can_exchange(mesh: Mesh) -> bool:
    """Whether the devices have the exchange: slices of a TPU v5e of more than 16 chips do not (libtpu 0.0.42)."""
    return not (mesh.devices.flat[0].device_kind == "TPU v5 lite" and mesh.size > 16)


def send_capacity(share: int) -> int:
    """Images that a device has room to send in a step of which it gets `share`.

    The rows of a step are random, so a slice has about Poisson(share) of them: eight standard deviations more than that
    occur once in 10^15 steps.
    """
    return share + 8 * math.isqrt(share) + 16


def make_routes(rows: Int[np.ndarray, "k b"], *, devices: int, slice_size: int) -> Routes:
    """The routes of batches whose images lie in slices of `slice_size` rows, one a device; padding is a device's own.

    Raises UserError: a step has more rows in one slice than `send_capacity`.
    """
    steps, share = len(rows), rows.shape[1] // devices
    capacity = send_capacity(share)
    target = np.broadcast_to(np.arange(rows.shape[1]) // share, rows.shape)
    # The first row of its own slice: all padding from one slice could be more than its device has room to send.
    owner, local = np.divmod(np.where(rows == PADDING, target * slice_size, rows), slice_size)
    pairs = (np.arange(steps)[:, None] * devices + owner) * devices + target
    sizes = np.bincount(pairs.ravel(), minlength=steps * devices**2).reshape(steps, devices, devices)  # owner, target
    if sizes.sum(axis=2).max() > capacity:
        raise UserError("one device holds too many images of a step: take --config.data.feed=streamed.")
    starts = np.cumsum(sizes, axis=2) - sizes  # in what an owner sends
    arrivals = np.cumsum(sizes, axis=1) - sizes  # in what a target gets
    send = np.zeros((steps, devices, capacity), np.int32)
    place = np.empty(rows.shape, np.int32)
    step = np.repeat(np.arange(steps), rows.shape[1])
    order = np.argsort(pairs.ravel(), kind="stable")
    found = np.divmod(order, rows.shape[1])  # step and position of each row, pair by pair
    owners, targets = owner[found], target[found]
    first = np.concatenate([[0], np.cumsum(sizes.ravel())[:-1]])[pairs.ravel()[order]]
    rank = np.arange(len(order)) - first  # within the pair
    send[step, owners, starts[step, owners, targets] + rank] = local[found]
    place[found] = arrivals[step, owners, targets] + rank
    runs = np.stack([starts, sizes, arrivals, sizes.swapaxes(1, 2)], axis=2).astype(np.int32)
    return Routes(send, runs, place)


def exchange(pixels: Shaped[Array, "n ..."], routes: Routes, mesh: Mesh | AbstractMesh) -> Shaped[Array, "b ..."]:
    """One batch from the slices on the devices; `routes` are those of one step, without their first axis."""
    (axis,) = mesh.axis_names
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"

    def own_share(pixels: Array, routes: Routes) -> Array:
        sent = pixels[routes.send[0]]
        received = jnp.zeros((len(routes.place), *pixels.shape[1:]), pixels.dtype)
        starts, sizes, arrivals, arriving = routes.runs[0]
        send = _summed_ragged_all_to_all if on_cpu else lax.ragged_all_to_all
        received = send(sent, received, starts, sizes, arrivals, arriving, axis_name=axis)
        return received[routes.place]

    cut = PartitionSpec(axis)
    return jax.shard_map(own_share, mesh=mesh, in_specs=(cut, cut), out_specs=cut, check_vma=False)(pixels, routes)


def _summed_ragged_all_to_all(
    operand: Array, output: Array, starts: Array, sizes: Array, arrivals: Array, arriving: Array, *, axis_name: str
) -> Array:
    """`lax.ragged_all_to_all`, which XLA's CPU backend lacks, as the sum of what each device has of a whole batch."""
    slots, ends = jnp.arange(len(operand)), starts + sizes
    target = jnp.minimum(jnp.searchsorted(ends, slots, side="right"), len(sizes) - 1)
    at = jnp.where(slots < ends[-1], target * len(output) + arrivals[target] + slots - starts[target], -1)
    whole = jnp.zeros((len(sizes) * len(output), *output.shape[1:]), output.dtype)
    whole = whole.at[at].set(operand, mode="drop", wrap_negative_indices=False)
    return output + lax.psum_scatter(whole, axis_name, tiled=True)
