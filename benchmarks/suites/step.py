"""The step alone: how fast the model trains when nothing else happens, and how near it comes to a matrix product."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suites.timing import Options, medians, rates, repeated
from benchmarks.suites.training import FixedBatch, arithmetic

SIDE = 2048  # of the square matrices of the product, in float32


def run(options: Options) -> dict[str, Any]:
    """Times many steps per dispatch on one fixed batch in device memory, on a CPU in turns with a large product."""
    train = options.config.train
    program, matrix, multiply = FixedBatch(options.config), jnp.ones((SIDE, SIDE)), jax.jit(jnp.matmul)
    cases = {"step": program.start()}
    # Devices of a CPU share its threads. Elsewhere the product would have one device, and another type than the step.
    comparable = jax.default_backend() == "cpu" and options.config.model.kind != "hierarchical"
    if comparable:
        cases["product"] = repeated(lambda: multiply(matrix, matrix), units=2 * SIDE**3)
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    memory = jax.local_devices()[0].memory_stats() or {}
    speed = medians(values)["step"]
    record = {
        "what": f"training steps on one fixed batch of {train.batch_size} in device memory, up to "
        f"{train.steps_per_dispatch} in one dispatch",
        "images_per_second": speed,
        "images_per_second_all": values["step"],
        "milliseconds_per_step": 1000 * train.batch_size / speed,
        "temporary_bytes": program.temporary_bytes,
        "peak_bytes_in_use": memory.get("peak_bytes_in_use"),  # of the device, where it tells
    }
    return record | (_beside_product(options, values) if comparable else {})


def _beside_product(options: Options, values: dict[str, list[float]]) -> dict[str, Any]:
    operations = arithmetic(options.config)
    a_second = operations * medians(values)["step"] / options.config.train.batch_size
    return {
        "operations_per_step": operations,
        "operations_per_second": a_second,
        "operations_per_second_of_product_all": values["product"],
        "share_of_product": a_second / medians(values)["product"],
    }
