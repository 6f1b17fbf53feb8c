"""Accelerators by the names that clouds give them, as devices to compile for; none has to be there."""

import difflib
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from facevae_jax.core.errors import UserError

GIB = 2**30
H100_DESCRIPTION = pathlib.Path(__file__).with_name("h100.txtpb")  # what XLA's GPU compiler must know of the card
GPU_SHARE = 0.75  # of a GPU's memory, which JAX's allocator takes


class Chip(NamedTuple):
    """What the maker says of one device."""

    memory: float  # bytes that a program can have
    flops: float  # a second, of products in bfloat16 (TPU) or TF32 (GPU)
    bandwidth: float  # bytes a second, of its memory
    clock: float = 0.0  # cycles a second, of a TPU: its peak / what its matrix units do in a cycle


class Slices(NamedTuple):
    """TPUs of one generation."""

    chip: Chip
    cores: int  # that its names count for each chip
    grids: dict[int, str]  # by number of chips


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
TPUS = {
    "v5e": Slices(Chip(15.75 * GIB, 197e12, 819e9, 1.5e9), 1, _FLAT),
    "v6e": Slices(Chip(31.25 * GIB, 918e12, 1640e9, 1.75e9), 1, _FLAT),
    "v5p": Slices(Chip(95 * GIB, 459e12, 2765e9, 1.75e9), 2, _CUBES),
    "v4": Slices(Chip(32 * GIB, 275e12, 1228e9, 1.05e9), 2, _CUBES),
}
H100 = Chip(GPU_SHARE * 84_942_979_072, 495e12, 3.35e12)


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    platform: str  # tpu or gpu
    chip: Chip
    devices: Sequence[Any]
    hosts: int


def names() -> list[str]:
    """The names of TPU slices; GPUs are named like 8xh100 (one host) and 2x8xh100 (two)."""
    tpus = [f"{kind}-{chips * each.cores}" for kind, each in TPUS.items() for chips in each.grids]
    return [*tpus, "1xh100", "8xh100", "2x8xh100"]


def topology_of(name: str) -> Topology:
    """The devices of a name such as v5e-16, v5p-128, 8xh100 or 2x8xh100.

    Raises:
      UserError: an unknown name, or the compiler's package is not installed.
    """
    gpus = re.fullmatch(r"(?:(\d+)x)?(\d+)xh100", name)
    tpu, _, size = name.replace("v5litepod", "v5e").partition("-")
    if gpus and int(gpus[1] or 1) * int(gpus[2]):
        return _gpus(name, hosts=int(gpus[1] or 1), devices=int(gpus[2]))
    if tpu in TPUS and size.isdigit() and int(size) / TPUS[tpu].cores in TPUS[tpu].grids:
        return _tpus(name, tpu, int(size) // TPUS[tpu].cores)
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or ["v5e-4", "v5p-8", "8xh100"]
    raise UserError(f"--topology={name!r} is not known: try {', '.join(near)}.")


def _tpus(name: str, kind: str, chips: int) -> Topology:
    _need("libtpu", extra="plan-tpu")
    # Or libtpu asks the network what machine this is, and locks out a second compilation.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    os.environ.update(settings | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    from jax.experimental import topologies

    slices = TPUS[kind]
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{slices.grids[chips]}", **bounds)
    return Topology(name, "tpu", slices.chip, described.devices, hosts=math.ceil(chips / 4))


def _gpus(name: str, *, hosts: int, devices: int) -> Topology:
    _need("jax_plugins.xla_cuda13", "jax_cuda13_plugin", extra="plan-gpu")
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x{hosts}x{devices}",
        target_config=H100_DESCRIPTION.read_text(),
    )
    return Topology(name, "gpu", H100, described.devices, hosts=hosts)


def _need(*modules: str, extra: str) -> None:
    for module in modules:
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            raise UserError(f'The compiler for it is not installed: pip install "facevae-jax[{extra}]".')
