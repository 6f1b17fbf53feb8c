"""Predicted scaling to many devices, on paper: `python -m benchmarks.scaling` prints the table of docs/scaling.md.

A step is its arithmetic plus its exchanges, one after the other: an upper bound on what waiting costs, since a compiler
may overlap them. An all-reduce of b bytes among n devices takes latency + 2 (n - 1) / n x b / bandwidth, the optimum of
Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 3.
"""

from typing import NamedTuple

from facevae_jax.config import DataConfig, ModelConfig, RunConfig
from facevae_jax.models.vae import forward_flops

FLOAT_BYTES = 4


class Fabric(NamedTuple):
    """Devices and what joins them."""

    name: str
    devices: int
    flops: float  # a second and device, as far as small convolutions reach: a tenth of the data sheet's matrix rate
    bandwidth: float  # bytes a second and device, each way
    latency: float  # seconds of an all-reduce of a few bytes among all


# Rates of the vendors' data sheets; latencies are assumptions, from what is commonly reported for all-reduces.
FABRICS = (
    Fabric("8 H100, NVLink", 8, 0.1 * 495e12, 450e9, 15e-6),
    Fabric("256 v5e, one slice", 256, 0.1 * 197e12, 100e9, 20e-6),
    Fabric("1,024 hosts of 8 H100", 8192, 0.1 * 495e12, 50e9, 60e-6),
)


class Work(NamedTuple):
    """What one step asks of a device."""

    flops_per_image: float
    parameters: int
    statistics: tuple[int, ...]  # channels of each batch normalisation; empty without
    latent_dim: int


def describe(config: RunConfig, *, parameters: int) -> Work:
    """The work of a config whose model has so many parameters."""
    filters = config.model.stage_filters(config.data.resolution)
    normalised = (*filters, *filters[:-1]) if config.model.normalization == "batch" else ()
    flops = 3 * forward_flops(config.model, config.data.resolution)  # gradients cost twice the forward pass
    return Work(flops, parameters, normalised, config.model.latent_dim)


def exchanges(work: Work) -> list[int]:
    """Bytes of every all-reduce of a step, as tests/test_communication.py finds them in the compiled program."""
    sums = [2 * channels * FLOAT_BYTES for channels in work.statistics] + [(1 + work.latent_dim) * FLOAT_BYTES]
    return [work.parameters * FLOAT_BYTES, *sums, *sums]  # those of sums there and back


def efficiency(work: Work, fabric: Fabric, *, images: float) -> float:
    """Share of a step that is arithmetic, with so many images a device."""
    compute = images * work.flops_per_image / fabric.flops
    share = 2 * (fabric.devices - 1) / fabric.devices
    waiting = sum(fabric.latency + share * size / fabric.bandwidth for size in exchanges(work))
    return compute / (compute + waiting)


def table() -> str:
    """Markdown: efficiency by fabric and images a device, with and without batch normalisation."""
    data, cases = DataConfig(name="ffhq", resolution=128), (16, 64, 256, 1024)
    lines = [
        "| devices | normalisation | " + " | ".join(f"{images} images a device" for images in cases) + " |",
        "| --- | --- |" + " --- |" * len(cases),
    ]
    for fabric in FABRICS:
        for normalization in ("batch", "group"):
            config = RunConfig(data=data, model=ModelConfig(normalization=normalization))
            work = describe(config, parameters=PARAMETERS)
            values = " | ".join(f"{efficiency(work, fabric, images=images):.0%}" for images in cases)
            lines.append(f"| {fabric.name} | {normalization} | {values} |")
    return "\n".join(lines)


PARAMETERS = 4_421_267  # of ffhq128, as the start of a run says; without batch normalisation a few fewer

if __name__ == "__main__":
    print(table())
