"""Normalization of features: of each channel over a batch, or of each image's groups of channels."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float, Shaped

from facevae_jax.models.api import Execution
from facevae_jax.models.blocks import Moments, by_channel, by_image

# Keras' value; Flax's is 1e-5.
BATCH_NORM_EPSILON = 1e-3
GROUP_NORM_EPSILON = 1e-6
GROUP_SIZE = 8  # channels that group normalization treats together


class Affine(NamedTuple):
    """Per-channel x * scale + shift, in float32."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]


def normalize_groups(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Zero mean and unit variance of each image's groups of `GROUP_SIZE` channels (Wu & He 2018)."""
    groups = x.reshape(*x.shape[:3], -1, math.gcd(GROUP_SIZE, x.shape[-1]))
    mean = jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
    variance = jnp.var(groups, axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) * lax.rsqrt(variance + GROUP_NORM_EPSILON)).reshape(x.shape)


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015), with the variables of `nn.BatchNorm`.

    The next layer applies it as it reads its input. With `Execution.few_launches` a training step applies it here.
    """

    momentum: float
    execution: Execution

    @nn.compact
    def __call__(
        self,
        y: Shaped[Array, "b h w c"],
        moments: Moments,
        bias: Float[Array, " c"],
        *,
        weights: Float[Array, " b"] | None,
        train: bool,
    ) -> tuple[Shaped[Array, "b h w c"], Affine | None]:
        """The features, and the `Affine` that normalizes them; None where they are normalized already.

        Args:
          y: what a convolution gives without its bias.
          moments: of `y` on this device.
          bias: of the convolution, which the running mean has.
          weights: of the images in the moments; None: all weigh 1.
          train: by the moments of the batch, over all devices; else by the running ones.
        """
        shape, execution = bias.shape, self.execution
        scale = self.param("scale", nn.initializers.ones, shape)
        offset = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, variance, affine = running_mean.value - bias, running_variance.value, None
        count = execution.devices * math.prod(y.shape[:3]) if train else 0
        if train and execution.few_launches:
            y, mean, variance = _normalized(y, scale, offset, weights, count, execution.axis)
        else:
            if train:
                total, square = execution.sum(moments)
                mean = total / count
                variance = jnp.maximum(square / count - jnp.square(mean), 0.0)
            factor = scale * lax.rsqrt(variance + BATCH_NORM_EPSILON)
            affine = Affine(factor, offset - mean * factor)
        if train and not self.is_initializing():
            for running, batch in ((running_mean, mean + bias), (running_variance, variance)):
                running.value = self.momentum * running.value + (1.0 - self.momentum) * batch
        return y, affine


class GroupNorm(nn.Module):
    """The parameters of `nn.GroupNorm`; `normalize_groups` does the rest where the next layer reads its input."""

    @nn.compact
    def __call__(self, channels: int) -> Affine:  # noqa: D102
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return Affine(scale, self.param("bias", nn.initializers.zeros, (channels,)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _normalized(
    y: Shaped[Array, "b h w c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    weights: Float[Array, " b"] | None,
    count: int,
    axis: str | None,
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"]]:
    """Normalizes features over a batch that the devices share, in few launches of a GPU.

    Both passes need two sums of each channel, and one reduction gives both. The gradient that JAX derives has many
    operations on each channel, for which XLA launches kernels of their own; that of the closed form below has few.

    Returns:
      The normalized features, the mean and the variance. No gradient goes through the mean and the variance.
    """
    return _forward(y, scale, offset, weights, count, axis)[0]


def _forward(y: Array, scale: Array, offset: Array, weights: Array | None, count: int, axis: str | None) -> Any:
    values = y.astype(jnp.float32)
    weighted = values if weights is None else values * by_image(weights)
    sums = _joint_sums(weighted, weighted * values, axis) / count
    mean = sums.real
    variance = jnp.maximum(sums.imag - jnp.square(mean), 0.0)
    root = lax.rsqrt(variance + BATCH_NORM_EPSILON)
    factor = scale * root
    # Computed once, and not again wherever the features are read.
    factor, shift, mean, root = lax.optimization_barrier((factor, offset - mean * factor, mean, root))
    output = values * by_channel(factor, y) + by_channel(shift, y)
    return (output, mean, variance), (y, factor, mean, root, weights)


def _backward(count: int, axis: str | None, residuals: Any, gradients: tuple[Array, Array, Array]) -> Any:
    """With x the features before scale and offset, factor (g - w mean(g) - w x mean(g x)): Ioffe & Szegedy, section 3.

    Each device computes the sums over all, so parameters' gradients are divided by the number of devices.
    """
    y, factor, mean, root, weights = residuals
    gradient = gradients[0]
    x = (y - by_channel(mean, y)) * by_channel(root, y)
    sums = _joint_sums(gradient * x, gradient, axis)
    of_scale, of_offset = sums.real, sums.imag
    common = (by_channel(of_offset, y) + x * by_channel(of_scale, y)) * (1 / count)
    if weights is not None:
        common *= by_image(weights)
    devices = lax.axis_size(axis) if axis else 1
    of_y = by_channel(factor, y) * (gradient - common)
    return of_y.astype(y.dtype), of_scale / devices, of_offset / devices, None


_normalized.defvjp(_forward, _backward)


def _joint_sums(first: Float[Array, "b h w c"], second: Array, axis: str | None) -> Complex[Array, " c"]:
    """The sums of each channel over all devices, as parts of complex numbers: one reduction and one exchange."""
    sums = jnp.sum(lax.complex(first, second), axis=(0, 1, 2))
    return lax.psum(sums, axis) if axis else sums
