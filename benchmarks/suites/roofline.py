"""The step against what this machine could do: its measured matrix products and memory, and the layers' cost."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suites import cost
from benchmarks.suites.options import Options
from benchmarks.suites.timing import Case, rates
from benchmarks.suites.training import FixedBatch

MATMUL_SIDE = 4096
COPY_BYTES = 256 * 2**20


def run(options: Options) -> dict[str, Any]:
    """Measures the machine and the step in turns, and the share of the bound that the step reaches."""
    config = options.config
    cases = {
        "step": FixedBatch(config).start(),
        "matmul": matmul_case(config.model.dtype),
        "copy": copy_case(),
    }
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    # Matrix products and copies are of one device; the step runs on all.
    devices = jax.device_count()
    flops_per_second = devices * statistics.median(values["matmul"])
    bytes_per_second = devices * statistics.median(values["copy"])
    flops, moved = cost.training_flops_per_image(config), cost.training_bytes_per_image(config)
    seconds = {"arithmetic": flops / flops_per_second, "memory": moved / bytes_per_second}
    bound = 1 / max(seconds.values())
    reached = statistics.median(values["step"])
    return {
        "what": f"training steps on one fixed batch of {config.train.batch_size} against max(arithmetic, memory): "
        f"the layers' operations at the rate of a {config.model.dtype} matrix product of side {MATMUL_SIDE} at jax's "
        "default precision, and the least bytes moved at the rate of a copy through memory",
        "mflop_per_image": flops / 1e6,
        "mbyte_per_image": moved / 1e6,
        "matmul_gflop_per_second": flops_per_second / 1e9,
        "matmul_gflop_per_second_all": [devices * value / 1e9 for value in values["matmul"]],
        "copy_gbyte_per_second": bytes_per_second / 1e9,
        "copy_gbyte_per_second_all": [devices * value / 1e9 for value in values["copy"]],
        "bound_images_per_second": {name: 1 / value for name, value in seconds.items()},
        "bound_by": max(seconds, key=seconds.__getitem__),
        "images_per_second": reached,
        "images_per_second_all": values["step"],
        "gflop_per_second": reached * flops / 1e9,
        "share_of_roofline": reached / bound,
    }


def matmul_case(dtype: str) -> Case:
    """A square matrix product on one device; its units are floating-point operations."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (MATMUL_SIDE, MATMUL_SIDE), jnp.dtype(dtype)) for key in keys)
    multiply = jax.jit(jnp.matmul)

    def measure(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            product = multiply(left, right)
        jax.block_until_ready(product)
        return time.perf_counter() - started

    return Case(measure, 2 * MATMUL_SIDE**3)


def copy_case() -> Case:
    """A pass over memory on one device, into a buffer that is there already; its units are bytes read and written.

    One is added on the way: XLA makes a mere copy one memcpy, which uses one core of a CPU.
    """
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    target = jnp.zeros_like(source)
    # Kept though unused: an argument that is dropped cannot be donated, and fresh memory costs page faults on a CPU.
    copy = jax.jit(lambda source, target: source + 1, donate_argnums=1, keep_unused=True)

    def measure(count: int) -> float:
        nonlocal target
        started = time.perf_counter()
        for _ in range(count):
            target = copy(source, target)
        jax.block_until_ready(target)
        return time.perf_counter() - started

    return Case(measure, 2 * source.nbytes)
