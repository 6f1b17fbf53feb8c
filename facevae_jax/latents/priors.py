"""Distributions over latents to draw new faces from."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Prior = Literal["standard", "gaussian"]


class LatentMoments(flax.struct.PyTreeNode):
    """Mean and covariance of the aggregate posterior, as the last evaluation measured them on its split."""

    images: Float[Array, ""]  # that were measured; 0 before the first evaluation
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
    # The symmetric root, not Cholesky's: rounding may leave eigenvalues a little below zero, which are cut off here.
    values, vectors = jnp.linalg.eigh(moments.covariance)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
    return moments.mean + noise @ root
