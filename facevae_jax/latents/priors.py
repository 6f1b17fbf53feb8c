"""Distributions over latents to draw new faces from."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Prior = Literal["standard", "gaussian"]
JITTER = 1e-6  # added to the covariance's diagonal, whose rounding error could make it indefinite


class LatentMoments(flax.struct.PyTreeNode):
    """Mean and covariance of the aggregate posterior, as the last evaluation measured them on its split."""

    mean: Float[Array, " z"]
    covariance: Float[Array, "z z"]


def sample_prior(prior: Prior, key: PRNGKeyArray, count: int, moments: LatentMoments) -> Float[Array, "count z"]:
    """Latents from N(0, I), or from the Gaussian with the mean and covariance of the aggregate posterior.

    Where the aggregate posterior is far from N(0, I), as with a strong reconstruction weight, the fitted Gaussian
    gives faces where the standard one gives noise (Ghosh et al. 2020, "From variational to deterministic
    autoencoders", section 4).
    """
    noise = jax.random.normal(key, (count, moments.mean.shape[0]))
    if prior == "standard":
        return noise
    factor = jnp.linalg.cholesky(moments.covariance + JITTER * jnp.eye(moments.mean.shape[0]))
    return moments.mean + noise @ factor.T
