"""The step alone: how fast the model trains when nothing else happens, and how near it comes to a matrix product."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suites.timing import Options, medians, rates, repeated
from benchmarks.suites.training import FixedBatch, arithmetic

SIDE = 2048  # of the square matrices of the product, in float32


def run(options: Options) -> dict[str, Any]:
    """Times many steps per dispatch on one fixed batch in device memory, in turns with a large product."""
    train = options.config.train
    program, matrix, multiply = FixedBatch(options.config), jnp.ones((SIDE, SIDE)), jax.jit(jnp.matmul)
    cases = {"step": program.start(), "product": repeated(lambda: multiply(matrix, matrix), units=2 * SIDE**3)}
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    memory = jax.local_devices()[0].memory_stats() or {}
    speed, product = medians(values)["step"], medians(values)["product"]
    operations = arithmetic(options.config)
    return {
        "what": f"training steps on one fixed batch of {train.batch_size} in device memory, up to "
        f"{train.steps_per_dispatch} in one dispatch",
        "images_per_second": speed,
        "images_per_second_all": values["step"],
        "milliseconds_per_step": 1000 * train.batch_size / speed,
        "operations_per_step": operations,
        "operations_per_second": operations * speed / train.batch_size,
        "operations_per_second_of_product": product,
        "operations_per_second_of_product_all": values["product"],
        "share_of_product": operations * speed / train.batch_size / product,
        "temporary_bytes": program.temporary_bytes,
        "peak_bytes_in_use": memory.get("peak_bytes_in_use"),  # of the device, where it tells
    }
