"""Principal components of the pixels (eigenfaces): the linear baseline, with the interface of the VAE."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from facevae_jax.config import CHANNELS, ModelConfig
from facevae_jax.models.vae import Decoded, Execution, Output, Posterior, deterministic, to_unit


class PCA(nn.Module):
    """x' = m + Σ z_i σ_i u_i, with latents z_i = u_iᵀ (x - m) / σ_i of variance 1 over the training images.

    So its N(0, I) is the Gaussian of the same mean and of the components' covariance. `training.pca` fits it.
    """

    config: ModelConfig
    resolution: int
    execution: Execution

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: height, width, channels."""
        return self.resolution, self.resolution, CHANNELS

    def setup(self) -> None:  # noqa: D102
        size, components = math.prod(self.image_shape), self.config.latent_dim
        self.mean = self.param("mean", nn.initializers.zeros, (size,))
        self.components = self.param("components", nn.initializers.zeros, (components, size))  # rows of length 1
        self.deviations = self.param("deviations", nn.initializers.ones, (components,))

    def __call__(self, images: Shaped[Array, "b h w c"], noise: Float[Array, "b z"], *, train: bool) -> Output:
        """Projects images, uint8 or in [0, 1], on the components; `noise` is not used."""
        del noise, train
        posterior = self.encode(images)
        return Output(self.describe(posterior.mean), posterior)

    def encode(self, images: Shaped[Array, "b h w c"]) -> Posterior:
        """Latents of images, uint8 or in [0, 1]."""
        flat = to_unit(images).reshape(images.shape[0], -1)
        projected = jnp.matmul(flat - self.mean, self.components.T, precision=jax.lax.Precision.HIGHEST)
        return deterministic(projected / self.deviations)

    def decode(self, latents: Float[Array, "b z"]) -> Float[Array, "b h w c"]:
        """Images in [0, 1] of latents."""
        scaled = latents * self.deviations
        flat = self.mean + jnp.matmul(scaled, self.components, precision=jax.lax.Precision.HIGHEST)
        return jnp.clip(flat, 0.0, 1.0).reshape(-1, *self.image_shape)

    def describe(self, latents: Float[Array, "b z"]) -> Decoded:
        """See `VAE.describe`."""
        return Decoded(self.decode(latents))
