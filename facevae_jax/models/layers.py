"""Layers of convolutional models: a convolution, then what the next layer still has to do to its output.

On a CPU a layer's time goes to memory, so normalization, activation and dropout are not written out: `Features` carries
them along, and the next convolution applies them to a few images at a time, while these are in the cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Key, Shaped, UInt32

from facevae_jax.core import random
from facevae_jax.core.settings import CHANNELS
from facevae_jax.models.api import Execution, to_unit
from facevae_jax.models.blocks import Moments, add_by_channel, apply_layer, block_size, by_channel
from facevae_jax.models.convolution import STRIDE, Form, convolution, transposed_convolution, upsampled_convolution
from facevae_jax.models.normalization import Affine, BatchNorm, GroupNorm, normalize_groups

LEAKY_RELU_SLOPE = 0.3  # Keras' value; Flax's is 0.01


@jax.jit  # a name in programs, which exporting to ONNX knows
def leaky_relu(x: jax.Array, negative_slope: jax.Array | float) -> jax.Array:
    """As a product, whose derivative is one more. That of `nn.leaky_relu` is a sum of two."""
    return x * jnp.where(x >= 0, 1.0, negative_slope)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "leaky_relu": functools.partial(leaky_relu, negative_slope=LEAKY_RELU_SLOPE),
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": nn.gelu,  # by tanh
    # As PyTorch computes it. That of JAX, by the complement, is more exact below zero and takes three times as long.
    "exact_gelu": lambda x: 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5))),
}


# A frozen dataclass, since it is a static argument, with kernel_size, normalization, batch_norm_momentum, activation,
# dropout_rate and dtype, as of `models.vae.Config`.
LayerConfig = Any


class Pending(NamedTuple):
    """Normalization, activation and dropout that a reader of `Features` applies."""

    affine: Affine | None
    kept: UInt32[Array, "b words"] | None  # bits: what dropout leaves; see `random.bernoulli_words`

    def apply(self, x: Float[Array, "b h w c"], config: LayerConfig) -> Float[Array, "b h w c"]:
        """In float32."""
        x = x.astype(jnp.float32)
        if config.normalization == "group":
            x = normalize_groups(x)
        if self.affine is not None:
            x = x * by_channel(self.affine.scale, x) + by_channel(self.affine.shift, x)
        x = ACTIVATIONS[config.activation](x)
        if self.kept is not None:
            probability = random.representable(1.0 - config.dropout_rate)
            x = jnp.where(random.unpack_bits(self.kept, x.shape[1:]), x / probability, 0.0)
        return x


class Features(NamedTuple):
    """What flows between layers: an array, and what is still to be done to it."""

    raw: Shaped[Array, "b h w c"]
    pending: Pending | None = None
    weights: Float[Array, " b"] | None = None  # of the images in the batch's moments; None: all weigh 1
    bias: Float[Array, " c"] | None = None  # not added yet; batch normalization would only take it away again

    def value(self, config: LayerConfig) -> Shaped[Array, "b h w c"]:
        """The array with all done."""
        return self.raw if self.pending is None else self.pending.apply(self.raw, config)


class Stage(nn.Module):
    """What follows a hidden convolution: normalization, activation and dropout, left pending."""

    config: LayerConfig
    execution: Execution

    @nn.compact
    def __call__(  # noqa: D102
        self, x: tuple[Features, Moments | None], keys: Key[Array, " b"] | None, *, train: bool
    ) -> Features:
        (features, moments), affine, kept = x, None, None
        y = features.raw
        if moments is not None and features.bias is not None:
            norm = BatchNorm(self.config.batch_norm_momentum, self.execution)
            y, affine = norm(y, moments, features.bias, weights=features.weights, train=train)
        elif self.config.normalization == "group":
            affine = GroupNorm()(y.shape[-1])
        if train and self.config.dropout_rate and keys is not None:
            probability = 1.0 - self.config.dropout_rate
            kept = random.bernoulli_words(keys, probability, math.prod(y.shape[1:]))
        return features._replace(raw=y, pending=Pending(affine, kept), bias=None)


class Convolution(nn.Module):
    """Base of the convolutions: applies what is pending of its input block by block."""

    features: int
    config: LayerConfig
    execution: Execution
    hidden: bool = True  # a `Stage` follows
    adds_bias: bool = True  # False, where it is not `hidden`: the reader adds it
    initializer: nn.initializers.Initializer = nn.initializers.glorot_uniform()  # of the kernel

    doubles: ClassVar[bool] = False  # height and width
    stride: ClassVar[int] = STRIDE
    function: ClassVar[Callable[..., Any]]  # of images and the kernel

    def kernel_ends(self, channels: int) -> tuple[int, int]:
        """The last two axes of the kernel."""
        return channels, self.features

    def patch(self, size: int, channels: int) -> int:
        """Numbers that a matrix product reads, or gives, at each place of the smaller side."""
        return size**2 * channels

    @nn.compact
    def __call__(self, x: Features) -> tuple[Features, Moments | None]:
        """The convolution, and the moments that batch normalization needs."""
        size, channels, dtype = self.config.kernel_size, x.raw.shape[-1], self.execution.dtype_of(self.config.dtype)
        shape = (size, size, *self.kernel_ends(channels))
        kernel = self.param("kernel", self.initializer, shape)
        if self.execution.few_passes and shape[2:] == (channels, CHANNELS):
            # The outputs are the colors of pixels. In the 128 lanes of a TPU's registers they would leave most empty.
            kernel = with_layout_constraint(kernel.astype(dtype), Layout((0, 1, 3, 2)))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        normalized = self.hidden and self.config.normalization == "batch"
        positions = x.raw.shape[1] * x.raw.shape[2] // (1 if self.doubles else self.stride**2)
        block = 0
        if self.execution.form == "matmul" and self.execution.block_bytes:
            patches = positions * self.patch(size, channels) * dtype.itemsize
            block = block_size(x.raw.shape[0], image_bytes=patches, limit=self.execution.block_bytes)
        affine, kept = x.pending or (None, None)
        layer = functools.partial(
            _convolve,
            function=self.function,
            form=self.execution.form,
            config=self.config if x.pending else None,
            dtype=dtype,
        )
        # Batch normalization takes the bias away again, so its gradient is zero. Added and subtracted it would have a
        # gradient of rounding noise, which Adam would scale up to full steps: a random walk.
        added = (self.hidden or self.adds_bias) and not normalized
        shared = (affine, kernel, bias if added else None)
        y, moments = apply_layer(layer, shared, x.raw, kept, block=block, moments=normalized, weights=x.weights)
        return Features(y, weights=x.weights, bias=None if added else bias), moments


def _convolve(
    shared: tuple[Affine | None, Array, Array | None],
    x: Array,
    kept: Array | None,
    *,
    function: Callable[..., Any],
    form: Form,
    config: LayerConfig | None,
    dtype: jnp.dtype,
) -> Array:
    affine, kernel, bias = shared
    if config is not None:
        x = Pending(affine, kept).apply(x, config)
    y = function(to_unit(x).astype(dtype), kernel.astype(dtype), form=form)
    if bias is None:
        return y
    bias = bias.astype(dtype)
    return add_by_channel(y, bias) if form == "matmul" else y + by_channel(bias, y)


class StridedConvolution(Convolution):
    """Halves height and width; parameters as `nn.Conv(features, (k, k), strides=2)`."""

    function = staticmethod(functools.partial(convolution, stride=STRIDE))


class TransposedConvolution(Convolution):
    """Doubles height and width; parameters as `nn.ConvTranspose(..., (k, k), strides=2, transpose_kernel=True)`."""

    doubles = True
    function = staticmethod(transposed_convolution)

    def kernel_ends(self, channels: int) -> tuple[int, int]:  # noqa: D102
        return self.features, channels

    def patch(self, size: int, channels: int) -> int:  # noqa: D102
        return size**2 * self.features


class UpsampledConvolution(Convolution):
    """Doubles height and width by nearest neighbors, then convolves; parameters as `nn.Conv(features, (k, k))`.

    A transposed convolution gives constant features a checkerboard, since its outputs have unlike numbers of terms.
    """

    doubles = True
    function = staticmethod(upsampled_convolution)

    def patch(self, size: int, channels: int) -> int:  # noqa: D102
        return (size + 1) ** 2 * self.features


class SameConvolution(Convolution):
    """Keeps height and width; parameters as `nn.Conv(features, (k, k))`."""

    stride = 1
    function = staticmethod(functools.partial(convolution, stride=1))


def layer_keys(keys: Key[Array, " b"] | None, layer: int) -> Key[Array, " b"] | None:
    """The images' keys for layer number `layer` of a network; None where nothing is drawn."""
    return None if keys is None else random.substream(keys, layer)
