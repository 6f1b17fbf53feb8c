"""How arrays lie on the devices: parameters on all, the batch cut along the mesh axis `data`."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis over all devices, or those given.

    Auto, not the default Explicit, which linen's Dropout cannot trace under.
    """
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_along(mesh: Mesh, axis: int) -> NamedSharding:
    """Cut along the array's dimension `axis`, one part a device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
