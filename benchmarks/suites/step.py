"""The step alone: how fast the model trains when nothing else happens, beside large matrix products."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suites.timing import Case, Options, medians, rates, repeated
from benchmarks.suites.training import FixedBatch, arithmetic

SIDES = (2048, 4096)  # of the square matrices, in float32. The share depends on it: 2048 is 10 to 15% faster.


def run(options: Options) -> dict[str, Any]:
    """Times many steps per dispatch on one fixed batch in device memory, on a CPU in turns with large products."""
    train = options.config.train
    program = FixedBatch(options.config)
    cases = {"step": program.start()}
    # Devices of a CPU share its threads. Elsewhere a product would have one device, and another type than the step.
    comparable = jax.default_backend() == "cpu" and options.config.model.kind != "hierarchical"
    if comparable:
        cases |= {str(side): _product(side) for side in SIDES}
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
    return record | (_beside_products(options, values) if comparable else {})


def _product(side: int) -> Case:
    matrix, multiply = jax.random.normal(jax.random.key(0), (side, side)), jax.jit(jnp.matmul)
    return repeated(lambda: multiply(matrix, matrix), units=2 * side**3)


def _beside_products(options: Options, values: dict[str, list[float]]) -> dict[str, Any]:
    operations, products = arithmetic(options.config), {str(side): values[str(side)] for side in SIDES}
    a_second = operations * medians(values)["step"] / options.config.train.batch_size
    return {
        "operations_per_step": operations,
        "operations_per_second": a_second,
        "operations_per_second_of_product_all": products,
        "share_of_product": {side: a_second / rate for side, rate in medians(products).items()},
    }
