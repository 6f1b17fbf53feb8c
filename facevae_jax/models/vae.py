"""The variational autoencoder: strided convolutions to a Gaussian posterior, transposed ones back to pixels.

With filters 32, 64, 64, 64, batch normalisation, LeakyReLU 0.3 and dropout 0.25 at 128x128 it is the network of Foster,
*Generative Deep Learning* (1st edition, chapter 3), which the preset `gdl128` reproduces.
"""

import functools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8, UInt32

from facevae_jax.config import CHANNELS, ModelConfig
from facevae_jax.models.blocks import Moments, apply_layer, block_size
from facevae_jax.models.convolution import STRIDE, Form, strided_convolution, transposed_convolution
from facevae_jax.models.logistic import LogisticMixture, from_outputs, output_channels

# Keras' values, which differ from Flax's (epsilon 1e-5, slope 0.01).
BATCH_NORM_EPSILON = 1e-3
LEAKY_RELU_SLOPE = 0.3
GROUP_NORM_EPSILON = 1e-6
GROUP_SIZE = 8  # channels that group normalisation treats together

# exp(10) is a standard deviation of 148 in a prior of 1, and exp(-20) one of 5e-5: no useful posterior is outside, and
# neither exp nor the KL can overflow inside.
LOG_VARIANCE_RANGE = (-20.0, 10.0)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "leaky_relu": functools.partial(nn.leaky_relu, negative_slope=LEAKY_RELU_SLOPE),
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": nn.gelu,
}


class Posterior(NamedTuple):
    """The diagonal Gaussian q(z | x), in float32."""

    mean: Float[Array, "b z"]
    log_variance: Float[Array, "b z"]

    def sample(self, noise: Float[Array, "b z"]) -> Float[Array, "b z"]:
        """mean + exp(log_variance / 2) * noise, which is drawn from N(0, I) (Kingma & Welling 2013, section 2.4)."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


def deterministic(mean: Float[Array, "b z"]) -> Posterior:
    """A code of a baseline as a posterior that is all but a point: e^-10 wide."""
    return Posterior(mean, jnp.full_like(mean, LOG_VARIANCE_RANGE[0]))


class Decoded(NamedTuple):
    """What a decoder says of the pixels."""

    images: Float[Array, "b h w c"]  # the mean, in [0, 1], float32
    distribution: LogisticMixture | None = None  # None where the objective's Gaussian is around the mean


class Output(NamedTuple):
    """What a forward pass gives."""

    decoded: Decoded
    posterior: Posterior

    @property
    def reconstruction(self) -> Float[Array, "b h w c"]:
        """In [0, 1], float32."""
        return self.decoded.images


class Affine(NamedTuple):
    """Per-channel x * scale + shift, in float32."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]


class Prologue(NamedTuple):
    """What happens to the output of a hidden convolution as the next layer reads it; see `apply_prologue`."""

    affine: Affine | None
    dropout_keys: UInt32[Array, "b 2"] | None  # one an image, so that its draws depend on no block or device


def apply_prologue(prologue: Prologue, x: Float[Array, "b h w c"], *, config: ModelConfig) -> Float[Array, "b h w c"]:
    """Normalisation, activation, dropout; in float32."""
    x = x.astype(jnp.float32)
    if config.normalization == "group":
        x = normalize_groups(x)
    if prologue.affine is not None:
        x = x * prologue.affine.scale + prologue.affine.shift
    x = ACTIVATIONS[config.activation](x)
    if prologue.dropout_keys is not None:
        keep = 1.0 - config.dropout_rate
        keys = jax.random.wrap_key_data(prologue.dropout_keys)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
        x = jnp.where(kept, x / keep, 0.0)
    return x


def normalize_groups(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Zero mean and unit variance of each image's groups of `GROUP_SIZE` channels (Wu & He 2018)."""
    groups = x.reshape(*x.shape[:3], -1, math.gcd(GROUP_SIZE, x.shape[-1]))
    mean = jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
    variance = jnp.var(groups, axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) * lax.rsqrt(variance + GROUP_NORM_EPSILON)).reshape(x.shape)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) from the batch's moments to the `Affine` that it amounts to.

    Variables are those of `nn.BatchNorm`; the next layer applies the result as it reads its input.
    """

    momentum: float

    @nn.compact
    def __call__(self, moments: Moments, *, count: int, train: bool) -> Affine:
        """`count` values a channel went into the moments."""
        shape = moments.total.shape
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean = moments.total / count
            variance = jnp.maximum(moments.square / count - jnp.square(mean), 0.0)
            if not self.is_initializing():
                for running, batch in ((running_mean, mean), (running_variance, variance)):
                    running.value = self.momentum * running.value + (1.0 - self.momentum) * batch
        factor = scale * lax.rsqrt(variance + BATCH_NORM_EPSILON)
        return Affine(factor, bias - mean * factor)


class GroupNorm(nn.Module):
    """The parameters of `nn.GroupNorm`; `normalize_groups` does the rest where the next layer reads its input."""

    @nn.compact
    def __call__(self, channels: int) -> Affine:  # noqa: D102
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return Affine(scale, self.param("bias", nn.initializers.zeros, (channels,)))


class Execution(NamedTuple):
    """How the model is computed; it changes the speed alone."""

    form: Form
    axis: str | None = None  # mesh axis along which devices have parts of a training batch; None: this one has it all


class Stage(nn.Module):
    """What follows a hidden convolution: normalisation, activation, dropout, as a `Prologue` of the next layer."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, y: Float[Array, "b h w c"], moments: Moments | None, *, train: bool) -> Prologue:  # noqa: D102
        affine, axis = None, self.execution.axis if train else None
        devices = lax.axis_size(axis) if axis else 1
        if moments is not None:
            norm = BatchNorm(self.config.batch_norm_momentum)
            moments = moments.over(axis) if axis else moments
            affine = norm(moments, count=devices * math.prod(y.shape[:3]), train=train)
        elif self.config.normalization == "group":
            affine = GroupNorm()(y.shape[-1])
        keys = None
        if train and self.config.dropout_rate:
            keys = jax.random.key_data(jax.random.split(self.make_rng("dropout"), devices * y.shape[0]))
            if axis:  # this device's part of what one device would draw
                keys = lax.dynamic_slice_in_dim(keys, lax.axis_index(axis) * y.shape[0], y.shape[0])
        return Prologue(affine, keys)


class Convolution(nn.Module):
    """A convolution of stride 2 that applies the prologue of its input block by block."""

    features: int
    config: ModelConfig
    execution: Execution
    hidden: bool = True  # a `Stage` follows

    transposed: ClassVar[bool]

    @nn.compact
    def __call__(  # noqa: D102
        self, x: Shaped[Array, "b h w c"], prologue: Prologue | None = None
    ) -> tuple[Float[Array, "b h2 w2 f"], Moments | None]:
        size, channels = self.config.kernel_size, x.shape[-1]
        ends = (self.features, channels) if self.transposed else (channels, self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (size, size, *ends))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.hidden and self.config.normalization == "batch":
            # Batch normalisation subtracts the bias again, so its true gradient is zero. What reverse mode computes
            # instead is rounding noise, which Adam would scale up to full steps: a random walk that depends on the
            # number of devices and that the running mean follows too late.
            bias = lax.stop_gradient(bias)
        positions = x.shape[1] * x.shape[2] // (1 if self.transposed else STRIDE**2)
        block = 0
        if self.execution.form == "matmul":
            patches = positions * size**2 * ends[0] * jnp.dtype(self.config.dtype).itemsize
            block = block_size(x.shape[0], image_bytes=patches)
        affine, keys = prologue or (None, None)
        layer = functools.partial(
            _convolve,
            convolution=transposed_convolution if self.transposed else strided_convolution,
            form=self.execution.form,
            config=self.config if prologue else None,
            dtype=jnp.dtype(self.config.dtype),
        )
        moments = self.hidden and self.config.normalization == "batch"
        return apply_layer(layer, (affine, kernel, bias), x, keys, block=block, moments=moments)


def _convolve(
    shared: tuple[Affine | None, Array, Array],
    x: Array,
    keys: Array | None,
    *,
    convolution: Callable[..., Array],
    form: Form,
    config: ModelConfig | None,
    dtype: jnp.dtype,
) -> Array:
    affine, kernel, bias = shared
    if config is not None:
        x = apply_prologue(Prologue(affine, keys), x, config=config)
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = to_unit(x)
    return convolution(x.astype(dtype), kernel.astype(dtype), form=form) + bias.astype(dtype)


class StridedConvolution(Convolution):
    """Halves height and width; parameters as `nn.Conv(features, (k, k), strides=2)`."""

    transposed = False


class TransposedConvolution(Convolution):
    """Doubles height and width; parameters as `nn.ConvTranspose(..., (k, k), strides=2, transpose_kernel=True)`."""

    transposed = True


class Encoder(nn.Module):
    """Images to the posterior: uint8 pixels, which the first convolution scales as it reads them, or [0, 1]."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, images: Shaped[Array, "b h w c"], *, train: bool) -> Posterior:  # noqa: D102
        dtype = jnp.dtype(self.config.dtype)
        x, prologue = images, None
        for filters in self.config.stage_filters(images.shape[1]):
            x, moments = StridedConvolution(filters, self.config, self.execution)(x, prologue)
            prologue = Stage(self.config, self.execution)(x, moments, train=train)
        if prologue is not None:
            x = apply_prologue(prologue, x, config=self.config)
        x = x.astype(dtype).reshape(x.shape[0], -1)
        dense = functools.partial(
            nn.Dense, self.config.latent_dim, dtype=dtype, kernel_init=nn.initializers.glorot_uniform()
        )
        mean = dense(name="mean")(x).astype(jnp.float32)
        if self.config.kind == "autoencoder":
            return deterministic(mean)
        log_variance = dense(name="log_variance")(x).astype(jnp.float32)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


class Decoder(nn.Module):
    """Latents to images in [0, 1], or to a mixture of so many components for each pixel."""

    config: ModelConfig
    resolution: int
    execution: Execution
    components: int

    @nn.compact
    def __call__(self, latents: Float[Array, "b z"], *, train: bool) -> Decoded:  # noqa: D102
        dtype = jnp.dtype(self.config.dtype)
        filters = self.config.stage_filters(self.resolution)
        grid = self.resolution // 2 ** len(filters)
        dense = nn.Dense(grid * grid * filters[-1], dtype=dtype, kernel_init=nn.initializers.glorot_uniform())
        x = dense(latents.astype(dtype)).reshape(-1, grid, grid, filters[-1])
        prologue = None
        for hidden in reversed(filters[:-1]):
            x, moments = TransposedConvolution(hidden, self.config, self.execution)(x, prologue)
            prologue = Stage(self.config, self.execution)(x, moments, train=train)
        channels = output_channels(self.components, CHANNELS) if self.components else CHANNELS
        x, _ = TransposedConvolution(channels, self.config, self.execution, hidden=False)(x, prologue)
        x = x.astype(jnp.float32)
        if not self.components:
            return Decoded(nn.sigmoid(x))
        distribution = from_outputs(x, self.components, CHANNELS)
        return Decoded(distribution.mean(), distribution)


class VAE(nn.Module):
    """Encoder, a draw from the posterior, decoder."""

    config: ModelConfig
    resolution: int
    execution: Execution
    components: int = 0  # of the discretized logistic mixture that the decoder gives; 0: it gives a mean alone

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: height, width, channels."""
        return self.resolution, self.resolution, CHANNELS

    def setup(self) -> None:  # noqa: D102
        self.encoder = Encoder(self.config, self.execution)
        self.decoder = Decoder(self.config, self.resolution, self.execution, self.components)

    def __call__(self, images: Shaped[Array, "b h w c"], noise: Float[Array, "b z"], *, train: bool) -> Output:
        """Reconstructs images, uint8 or in [0, 1], from one draw of the posterior; `noise` is from N(0, I)."""
        posterior = self.encoder(images, train=train)
        return Output(self.decoder(posterior.sample(noise), train=train), posterior)

    def encode(self, images: Shaped[Array, "b h w c"]) -> Posterior:
        """The posterior of images, uint8 or in [0, 1], for evaluation."""
        return self.encoder(images, train=False)

    def decode(self, latents: Float[Array, "b z"]) -> Float[Array, "b h w c"]:
        """Images in [0, 1] of latents, for evaluation."""
        return self.decoder(latents, train=False).images

    def describe(self, latents: Float[Array, "b z"]) -> Decoded:
        """What is said of the pixels of latents, for likelihoods."""
        return self.decoder(latents, train=False)


def forward_flops(config: ModelConfig, resolution: int) -> int:
    """Multiplications and additions of one image's way through the convolutions and the dense layers.

    A convolution and the transposed one between the same two grids cost the same: each position of the smaller grid
    meets k x k positions of the larger.
    """
    filters = config.stage_filters(resolution)
    grid = (resolution >> len(filters)) ** 2
    dense = 3 * grid * filters[-1] * config.latent_dim
    pairs = zip((CHANNELS, *filters[:-1]), filters, strict=True)
    strided = sum(
        (resolution >> (i + 1)) ** 2 * config.kernel_size**2 * wide * narrow for i, (wide, narrow) in enumerate(pairs)
    )
    return 2 * (dense + 2 * strided)


def to_unit(images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Pixels 0..255 to float32 in [0, 1]; what is no integer is left as it is."""
    return images.astype(jnp.float32) / 255.0 if jnp.issubdtype(images.dtype, jnp.integer) else images


def to_pixels(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """[0, 1] to the nearest pixel value 0..255."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
