"""The step against the bound of this machine: its measured matrix products and memory, and the model's cost."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suites.timing import Case, Options, rates, repeated
from benchmarks.suites.training import FixedBatch
from facevae_jax.config import RunConfig
from facevae_jax.models.api import Execution, image_keys
from facevae_jax.training.setup import build_model

MATMUL_SIDE = 4096
COPY_BYTES = 256 * 2**20
# Passes over each quantity in a step:
PASSES = 3  # operations: forward, and the gradients by the input and by the weights
ACTIVATION_PASSES = 5  # written and read forward, read again backward, where the gradient is written and read
PIXEL_PASSES = 3  # uint8: read as the input, in the loss, and for the gradient of the first kernel
WEIGHT_PASSES = 10  # read forward, backward and by Adam, and written; gradient and two moments are read and written
WEIGHT_BYTES = 4  # float32, whatever the computation's dtype


def run(options: Options) -> dict[str, Any]:
    """Measures the machine and the step in turns, and computes the share of the bound that the step reaches."""
    config = options.config
    dtype = getattr(config.model, "dtype", "float32")
    cases = {"step": FixedBatch(config).start(), "matmul": matmul_case(dtype), "copy": copy_case()}
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    # Matrix products and copies run on one device, the step on all.
    products, copies = ([jax.device_count() * x / 1e9 for x in values[name]] for name in ("matmul", "copy"))
    medians = {
        "matmul_gflop_per_second": statistics.median(products),
        "copy_gbyte_per_second": statistics.median(copies),
    }
    gflop, gbyte = (cost / 1e9 for cost in training_cost(config, dtype))
    bounds = {
        "arithmetic": medians["matmul_gflop_per_second"] / gflop,
        "memory": medians["copy_gbyte_per_second"] / gbyte,
    }
    reached = statistics.median(values["step"])
    return {
        "what": f"training steps on one fixed batch of {config.train.batch_size} against max(arithmetic, memory): "
        f"the model's operations at the rate of a {dtype} matrix product of side {MATMUL_SIDE} at jax's default "
        "precision, and the least bytes moved at the rate of a copy through memory",
        "mflop_per_image": gflop * 1e3,
        "mbyte_per_image": gbyte * 1e3,
        **medians,
        "matmul_gflop_per_second_all": products,
        "copy_gbyte_per_second_all": copies,
        "bound_images_per_second": bounds,
        "bound_by": min(bounds, key=bounds.__getitem__),
        "images_per_second": reached,
        "images_per_second_all": values["step"],
        "gflop_per_second": reached * gflop,
        "share_of_roofline": reached / min(bounds.values()),
    }


def training_cost(config: RunConfig, dtype: str) -> tuple[float, float]:
    """Floating-point operations, and the least bytes moved, of one image in a training step.

    The operations are those that XLA counts in the forward pass, times `PASSES`. The bytes assume that nothing stays in
    a cache between layers and that elementwise work (normalization, activation, dropout) fuses into the layers. They
    leave out the extra pass for the sums in the gradient of batch normalization.
    """
    # The plain form: XLA counts the body of a loop once, however often it runs.
    model, _ = build_model(config, Execution("plain"))
    image, keys = jnp.zeros((1, *model.image_shape)), image_keys(jax.random.key(0), 1)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, keys, train=False))

    def forward(variables: Any, image: Any) -> Any:
        code = model.apply(variables, image, method="encode").mean
        return model.apply(variables, code, method="decode").mean

    traced = jax.jit(forward).trace(variables, image)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1)
    moved = (
        ACTIVATION_PASSES * layer_outputs(traced.jaxpr.jaxpr) * jnp.dtype(dtype).itemsize
        + PIXEL_PASSES * image.size
        + WEIGHT_PASSES * weights * WEIGHT_BYTES / config.train.batch_size
    )
    return PASSES * traced.lower().cost_analysis()["flops"], moved


def layer_outputs(jaxpr: Any) -> int:
    """How many values the convolutions and matrix products of a program give, its inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            total += sum(output.aval.size for output in equation.outvars)
        total += sum(layer_outputs(inner.jaxpr) for inner in equation.params.values() if hasattr(inner, "jaxpr"))
    return total


def matmul_case(dtype: str) -> Case:
    """A square matrix product on one device; its units are floating-point operations."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (MATMUL_SIDE, MATMUL_SIDE), jnp.dtype(dtype)) for key in keys)
    multiply = jax.jit(jnp.matmul)
    return repeated(lambda: multiply(left, right), 2 * MATMUL_SIDE**3)


def copy_case() -> Case:
    """A pass over memory on one device, into an existing buffer; its units are bytes read and written.

    It adds one, as XLA turns a plain copy into one memcpy, which uses one core of a CPU.
    """
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    target = jnp.zeros_like(source)
    # keep_unused: a dropped argument cannot be donated, and fresh memory costs page faults on a CPU.
    add_one = jax.jit(lambda source, target: source + 1, donate_argnums=1, keep_unused=True)

    def copy() -> jax.Array:
        nonlocal target
        target = add_one(source, target)
        return target

    return repeated(copy, 2 * source.nbytes)
