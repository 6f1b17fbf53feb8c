"""What the latents carry, and how far they are from the prior."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from facevae_jax.models.inference import Encoded
from facevae_jax.models.vae import Posterior
from facevae_jax.objective import gaussian_kl
from facevae_jax.training.step import ACTIVE_VARIANCE


def kl_by_dimension(posterior: Encoded) -> Float32[np.ndarray, " z"]:
    """KL to N(0, 1) of each latent dimension, nats, the mean over images."""
    kl = gaussian_kl(Posterior(jnp.asarray(posterior.mean), jnp.asarray(posterior.log_variance)))
    return np.asarray(kl).mean(axis=0)


def active_units(posterior: Encoded) -> int:
    """Latent dimensions whose posterior means vary over the data by more than `ACTIVE_VARIANCE`."""
    return int(np.sum(posterior.mean.var(axis=0) > ACTIVE_VARIANCE))


def gaussian_kl_to_prior(mean: Float[np.ndarray, " z"], covariance: Float[np.ndarray, "z z"]) -> float:
    """KL(N(mean, covariance) || N(0, I)), nats: 1/2 (tr C + mᵀm - z - log det C).

    Of the aggregate posterior's moments it is the part of KL(q(z) || N(0, I)) that mean and covariance tell; 0 where
    they are those of the prior. What samples from N(0, I) lack against faces is at least this.
    """
    _, log_determinant = np.linalg.slogdet(covariance)
    return float(0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_determinant))
