"""The variational autoencoder: strided convolutions to a Gaussian posterior, transposed ones back to pixels.

With filters 32, 64, 64, 64, batch normalisation, LeakyReLU 0.3 and dropout 0.25 at 128x128 it is the network of Foster,
*Generative Deep Learning* (1st edition, chapter 3), which the preset `gdl128` reproduces.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from facevae_jax.config import CHANNELS, ModelConfig
from facevae_jax.models.convolution import Form, StridedConvolution, TransposedConvolution

# Keras' values, which differ from Flax's (epsilon 1e-5, slope 0.01).
BATCH_NORM_EPSILON = 1e-3
LEAKY_RELU_SLOPE = 0.3
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

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b z"]:
        """mean + exp(log_variance / 2) * eps with eps from N(0, I) (Kingma & Welling 2013, section 2.4)."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)


class Output(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Float[Array, "b h w c"]  # in [0, 1], float32
    posterior: Posterior


class Stage(nn.Module):
    """What follows a hidden convolution: normalisation, activation, dropout."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:  # noqa: D102
        dtype = jnp.dtype(self.config.dtype)
        if self.config.normalization == "batch":
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=self.config.batch_norm_momentum,
                epsilon=BATCH_NORM_EPSILON,
                dtype=dtype,
            )(x)
        elif self.config.normalization == "group":
            x = nn.GroupNorm(num_groups=None, group_size=math.gcd(GROUP_SIZE, x.shape[-1]), dtype=dtype)(x)
        x = ACTIVATIONS[self.config.activation](x)
        return nn.Dropout(self.config.dropout_rate, deterministic=not train)(x)


class Encoder(nn.Module):
    """Images in [0, 1] to the posterior."""

    config: ModelConfig
    form: Form

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> Posterior:  # noqa: D102
        dtype = jnp.dtype(self.config.dtype)
        x = images.astype(dtype)
        for filters in self.config.stage_filters(images.shape[1]):
            x = StridedConvolution(filters, self.form, dtype, train_bias=self.config.normalization != "batch")(x)
            x = Stage(self.config)(x, train=train)
        x = x.reshape(x.shape[0], -1)
        dense = functools.partial(
            nn.Dense, self.config.latent_dim, dtype=dtype, kernel_init=nn.initializers.glorot_uniform()
        )
        mean = dense(name="mean")(x).astype(jnp.float32)
        log_variance = dense(name="log_variance")(x).astype(jnp.float32)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


class Decoder(nn.Module):
    """Latents to images in [0, 1]."""

    config: ModelConfig
    resolution: int
    form: Form

    @nn.compact
    def __call__(self, latents: Float[Array, "b z"], *, train: bool) -> Float[Array, "b h w c"]:  # noqa: D102
        dtype = jnp.dtype(self.config.dtype)
        filters = self.config.stage_filters(self.resolution)
        grid = self.resolution // 2 ** len(filters)
        dense = nn.Dense(grid * grid * filters[-1], dtype=dtype, kernel_init=nn.initializers.glorot_uniform())
        x = dense(latents.astype(dtype)).reshape(-1, grid, grid, filters[-1])
        for hidden in reversed(filters[:-1]):
            x = TransposedConvolution(hidden, self.form, dtype, train_bias=self.config.normalization != "batch")(x)
            x = Stage(self.config)(x, train=train)
        x = TransposedConvolution(CHANNELS, self.form, dtype)(x)
        return nn.sigmoid(x.astype(jnp.float32))


class VAE(nn.Module):
    """Encoder, a draw from the posterior, decoder."""

    config: ModelConfig
    resolution: int
    form: Form

    def setup(self) -> None:  # noqa: D102
        self.encoder = Encoder(self.config, self.form)
        self.decoder = Decoder(self.config, self.resolution, self.form)

    def __call__(self, images: Float[Array, "b h w c"], latent_key: PRNGKeyArray, *, train: bool) -> Output:
        """Reconstructs images in [0, 1] from one draw of the posterior."""
        posterior = self.encoder(images, train=train)
        return Output(self.decoder(posterior.sample(latent_key), train=train), posterior)

    def encode(self, images: Float[Array, "b h w c"]) -> Posterior:
        """The posterior of images in [0, 1], for evaluation."""
        return self.encoder(images, train=False)

    def decode(self, latents: Float[Array, "b z"]) -> Float[Array, "b h w c"]:
        """Images in [0, 1] of latents, for evaluation."""
        return self.decoder(latents, train=False)


def to_unit(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Pixels 0..255 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def to_pixels(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """[0, 1] to the nearest pixel value 0..255."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
