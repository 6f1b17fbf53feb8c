"""A layer over a batch, a few images at a time where that keeps its work in the processor's cache.

A convolution as a matrix product reads patches that are k x k / 4 times its input. Those of a whole batch are written
to memory and read back, which takes longer than the arithmetic; those of a few images never leave the cache. The
gradient goes through the same blocks and computes what is cheap (normalization, activation, patches) again instead of
keeping it, so a layer's only residuals are its input and its output.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

# Of patches. On 2 cores with 1 MiB of L2 each, half and twice as much train about 5% slower, all at once 2.5 times.
BLOCK_BYTES = 3 * 2**20
CORE_BLOCK_BYTES = BLOCK_BYTES // 4  # where each core is a device, with a cache of its own
FEW_CHANNELS = 8  # fill no vector registers: sums by whole rows take a sixth to a third of the time

# (shared, images, extras) -> output; pure, and independent between images
Layer = Callable[[Any, Array, Any], Array]


class Moments(NamedTuple):
    """Per-channel sums over images, rows and columns, in float32: the statistics of batch normalization in one pass."""

    total: Float[Array, " f"]
    square: Float[Array, " f"]


def apply_layer(
    layer: Layer,
    shared: Any,
    x: Shaped[Array, "b ..."],
    extras: Any,
    *,
    block: int,
    moments: bool,
    weights: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b h w f"], Moments | None]:
    """`layer` of a batch and, with `moments`, the moments of its output.

    Args:
      layer: a function of (shared, some images' x, their extras); it must not hold traced arrays itself.
      shared: arrays that all images share, such as the kernel.
      x: the input of each image; integers, such as pixels, have no gradient.
      extras: a tree of arrays [b, ...] without gradients, such as keys.
      block: images at a time, a divisor of b; 0 is the whole batch at once, left to XLA.
      moments: whether they are needed.
      weights: of the images in the moments; None: all weigh 1.

    Raises:
      ValueError: if `block` does not divide b.
    """
    if not block:
        y = layer(shared, x, extras)
        return y, _moments(y, weights) if moments else None
    if len(x) % block:
        raise ValueError(f"Blocks of {block} images do not divide a batch of {len(x)}: give a divisor, or 0.")
    return _blocked(layer, block, moments, shared, x, extras, weights)


def block_size(batch: int, *, image_bytes: int, limit: int = BLOCK_BYTES) -> int:
    """The largest divisor of `batch` whose images need at most `limit` bytes; 1 if one image already exceeds it."""
    divisors = (size for size in range(batch, 0, -1) if batch % size == 0)
    return next(size for size in divisors if size * image_bytes <= limit or size == 1)


def by_channel(values: Float[Array, " c"], x: Shaped[Array, "... c"]) -> Float[Array, "... c"]:
    """One value for each channel of `x`, with as many axes: ranks are never promoted silently."""
    return values.reshape(*[1] * (x.ndim - 1), -1)


@jax.custom_vjp
def add_by_channel(x: Float[Array, "b h w c"], values: Float[Array, " c"]) -> Float[Array, "b h w c"]:
    """`x` and one value for each channel. The gradient of few channels is added up on a CPU by whole rows first."""
    return x + by_channel(values, x)


def _add_by_channel_gradients(_: None, gradient: Float[Array, "b h w c"]) -> tuple[Array, Array]:
    batch, height, width, channels = gradient.shape
    if channels > FEW_CHANNELS:
        return gradient, jnp.sum(gradient, axis=(0, 1, 2))
    rows = jnp.sum(gradient.reshape(batch * height, width * channels), axis=0)
    # Without the barrier XLA makes one sum of both.
    return gradient, jnp.sum(lax.optimization_barrier(rows).reshape(width, channels), axis=0)


add_by_channel.defvjp(lambda x, values: (add_by_channel(x, values), None), _add_by_channel_gradients)


def by_image(weights: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    """One value for each image, with the axes of features."""
    return weights.reshape(-1, 1, 1, 1)


def _moments(
    y: Float[Array, "b h w f"], weights: Float[Array, " b"] | None, *, axis: tuple[int, ...] = (0, 1, 2)
) -> Moments:
    y = y.astype(jnp.float32)
    weighted = y if weights is None else y * by_image(weights)
    return Moments(jnp.sum(weighted, axis=axis), jnp.sum(weighted * y, axis=axis))


def _scan(
    function: Callable[[Any], tuple[Any, Any]], inputs: Any, block: int, sums: Any, outputs: Any
) -> tuple[Any, Any]:
    """Calls `function` with `block` images of `inputs` at a time.

    Args:
      function: of some images; returns terms of the sums and these images' part of the outputs.
      inputs: a tree of arrays [b, ...].
      block: a divisor of b.
      sums: where the sums start.
      outputs: a tree of arrays [1, b, ...] to overwrite, such as `_zeros`.

    Returns:
      The sums, and the outputs [b, ...].
    """

    def turn(state: tuple[Any, Any], first: Array) -> tuple[tuple[Any, Any], None]:
        sums, outputs = state
        images = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, block), inputs)
        terms, parts = function(images)
        sums = jax.tree.map(jnp.add, sums, terms)
        # Without a first axis of 1 XLA copies the block of a transposed convolution and computes its last part twice.
        outputs = jax.tree.map(
            lambda a, part: lax.dynamic_update_slice_in_dim(a, part[None], first, axis=1), outputs, parts
        )
        return (sums, outputs), None

    batch = len(jax.tree.leaves(inputs)[0])
    # Not scan's own outputs, which XLA would start as copies of one array of zeros.
    sums, outputs = lax.scan(turn, (sums, outputs), jnp.arange(0, batch, block))[0]
    return sums, jax.tree.map(lambda a: a[0], outputs)


def _zeros(shape: tuple[int, ...], dtype: Any, number_of: Array) -> Array:
    """Zeros [1, *shape] that XLA does not recognize as a constant: it would copy one array of zeros for each use.

    LLVM recognizes them and calls memset, three times as fast as a loop. They come from the first number of an array.
    """
    # 0 or 1, shifted right by one bit: 0.
    zero = (number_of.reshape(-1)[0] > 0).astype(jnp.uint32) >> 1
    return jnp.full((1, *shape), zero, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked(
    layer: Layer, block: int, with_moments: bool, shared: Any, x: Array, extras: Any, weights: Array | None
) -> tuple[Array, Moments | None]:
    def one(images: tuple[Array, Any, Array | None]) -> tuple[None, tuple[Array, Moments | None]]:
        x, extras, weights = images
        y = layer(shared, x, extras)
        # Of each image, as sums of sums are more exact than one long sum.
        return None, (y, _moments(y, weights, axis=(1, 2)) if with_moments else None)

    images = (x, extras, weights)
    _, parts = jax.eval_shape(one, jax.tree.map(lambda a: a[:block], images))
    outputs = jax.tree.map(lambda part: _zeros((len(x), *part.shape[1:]), part.dtype, x), parts)
    _, (y, moments) = _scan(one, images, block, None, outputs)
    return y, jax.tree.map(lambda sums: jnp.sum(sums, axis=0), moments)


def _forward(
    layer: Layer, block: int, with_moments: bool, shared: Any, x: Array, extras: Any, weights: Array | None
) -> tuple[Any, Any]:
    y, moments = _blocked(layer, block, with_moments, shared, x, extras, weights)
    return (y, moments), (shared, x, extras, y if with_moments else None, weights)


def _backward(
    layer: Layer, block: int, with_moments: bool, residuals: Any, gradients: tuple[Array, Moments | None]
) -> Any:
    shared, x, extras, y, weights = residuals
    of_y, of_moments = gradients
    smooth = jnp.issubdtype(x.dtype, jnp.inexact)

    def one(images: Any) -> tuple[Any, Array | None]:
        x, extras, y, weights, of_y = images
        if of_moments is not None and y is not None:  # what y gave to the moments
            total, square = (by_channel(gradient, y) for gradient in of_moments)
            of_moments_y = total + 2.0 * square * y
            if weights is not None:
                of_moments_y *= by_image(weights)
            of_y = (of_y + of_moments_y).astype(of_y.dtype)
        if not smooth:
            return jax.vjp(lambda shared: layer(shared, x, extras), shared)[1](of_y)[0], None
        return jax.vjp(lambda shared, x: layer(shared, x, extras), shared, x)[1](of_y)

    zeros = jax.tree.map(jnp.zeros_like, shared)
    of_x = _zeros(x.shape, x.dtype, of_y) if smooth else None
    of_shared, of_x = _scan(one, (x, extras, y, weights, of_y), block, zeros, of_x)
    return of_shared, of_x, None, None


_blocked.defvjp(_forward, _backward)
