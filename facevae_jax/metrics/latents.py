"""KL by dimension, active units, and the distance of the aggregate posterior from N(0, I)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from facevae_jax.inference import Encoded
from facevae_jax.latents.moments import Moments
from facevae_jax.models.api import Gaussian
from facevae_jax.objective import gaussian_kl
from facevae_jax.training.evaluation import ACTIVE_VARIANCE


def kl_by_dimension(posterior: Encoded) -> Float32[np.ndarray, " z"]:
    """KL to N(0, 1) of each number of the code, nats, the mean over images."""
    kl = gaussian_kl(Gaussian(jnp.asarray(posterior.mean), jnp.asarray(posterior.log_variance)))
    return np.asarray(kl).mean(axis=0)


def active_units(posterior: Encoded) -> int:
    """Numbers of the code whose posterior means vary over the data by more than `ACTIVE_VARIANCE`."""
    return int(np.sum(posterior.mean.var(axis=0) > ACTIVE_VARIANCE))


def gaussian_kl_to_prior(moments: Moments) -> float:
    """KL(N(mean, covariance) || N(0, I)), nats: 1/2 (tr C + mᵀm - z - log det C).

    For the moments of the aggregate posterior it is the part of KL(q(z) || N(0, I)) that is due to mean and covariance:
    a lower bound on how far samples from N(0, I) are from the codes.
    """
    mean, covariance, _ = moments
    _, log_determinant = np.linalg.slogdet(covariance)
    return float(0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_determinant))
