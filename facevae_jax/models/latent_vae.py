"""A small VAE whose "images" are another VAE's latents: the second stage of Dai & Wipf 2019."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from facevae_jax.models.vae import LOG_VARIANCE_RANGE, Decoded, Execution, Output, Posterior

LAYERS = 2


class LatentVAE(nn.Module):
    """Two hidden layers each way; the input is [b, 1, 1, z], so that the trainer takes it for an image."""

    latent_dim: int  # z, of the input and of its own latents alike
    width: int  # of the hidden layers
    execution: Execution

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one input."""
        return 1, 1, self.latent_dim

    def setup(self) -> None:  # noqa: D102
        self.encoder = Perceptron(self.width, 2 * self.latent_dim)
        self.decoder = Perceptron(self.width, self.latent_dim)

    def __call__(self, images: Float[Array, "b 1 1 z"], noise: Float[Array, "b z"], *, train: bool) -> Output:
        """Reconstructs latents from one draw of the posterior; `noise` is from N(0, I)."""
        del train
        posterior = self.encode(images)
        return Output(self.describe(posterior.sample(noise)), posterior)

    def encode(self, images: Float[Array, "b 1 1 z"]) -> Posterior:
        """The posterior of latents."""
        mean, log_variance = jnp.split(self.encoder(images[:, 0, 0]), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents: Float[Array, "b z"]) -> Float[Array, "b 1 1 z"]:
        """First-stage latents of second-stage ones."""
        return self.decoder(latents)[:, None, None]

    def describe(self, latents: Float[Array, "b z"]) -> Decoded:
        """See `VAE.describe`."""
        return Decoded(self.decode(latents))


class Perceptron(nn.Module):
    """Dense layers with SiLU, beside a linear way around them, so that what is linear need not be learnt twice."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:  # noqa: D102
        y = x
        for _ in range(LAYERS):
            y = nn.silu(nn.Dense(self.width)(y))
        return nn.Dense(self.features)(jnp.concatenate([y, x], axis=-1))
