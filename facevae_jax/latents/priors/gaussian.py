"""Gaussian priors: N(0, I), and the one with the moments of the aggregate posterior."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from facevae_jax.latents.moments import Moments
from facevae_jax.latents.priors.base import FitData, Indices, normal_by_index


class Gaussian(NamedTuple):
    """N(m, R Rᵀ)."""

    mean: Float[Array, " z"]
    root: Float[Array, "z z"]

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: Any = 1.0) -> Float[Array, "n z"]:
        """Codes number `indices` of the stream `key`."""
        noise = normal_by_index(key, indices, self.mean.shape[0])
        return self.mean[None] + temperature * noise @ self.root.T

    def log_density(self, codes: Float[Array, "n z"]) -> Float[Array, " n"]:
        """log p(code), nats."""
        # By the singular values of the root, which need not be triangular and may be singular.
        left, values, _ = jnp.linalg.svd(self.root)
        scaled = jnp.matmul(codes - self.mean[None], left, precision=jax.lax.Precision.HIGHEST) / values[None]
        return -0.5 * jnp.sum(jnp.square(scaled) + math.log(2 * math.pi) + 2 * jnp.log(values)[None], axis=1)


class StandardPrior(Gaussian):
    """N(0, I)."""

    label: ClassVar[str] = "N(0, I)"
    description: ClassVar[str] = "N(0, I), the prior of the training objective"

    @classmethod
    def of_size(cls, size: int) -> "StandardPrior":
        """For codes of `size` numbers."""
        return cls(jnp.zeros(size), jnp.eye(size))

    @classmethod
    def fit(cls, data: FitData) -> "StandardPrior":
        """Needs only the size of a code."""
        return cls.of_size(data.code_size)


class GaussianPrior(Gaussian):
    """The Gaussian with the mean and covariance of the aggregate posterior.

    If the aggregate posterior is far from N(0, I), as with a large reconstruction weight, its samples are faces where
    those of N(0, I) are noise (Ghosh et al. 2020, "From variational to deterministic autoencoders", section 4).
    """

    label: ClassVar[str] = "Gaussian, fitted to the faces"
    description: ClassVar[str] = "mean and covariance of the posteriors of the training split"

    @classmethod
    def of(cls, moments: Moments, *, smallest: float = 0.0) -> "GaussianPrior":
        """With these moments, and in no direction less variance than `smallest` times the largest."""
        # The symmetric root, not Cholesky's: rounding may leave slightly negative eigenvalues, which are set to 0.
        values, vectors = np.linalg.eigh(moments.covariance)
        root = (vectors * np.sqrt(values.clip(smallest * values.max()))) @ vectors.T
        return cls(jnp.asarray(moments.mean, jnp.float32), jnp.asarray(root, jnp.float32))

    @classmethod
    def fit(cls, data: FitData) -> "GaussianPrior":
        """From the moments of the training split."""
        return cls.of(data.moments())
