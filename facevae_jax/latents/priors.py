"""Distributions over latents to draw new faces from.

A draw is a function of (key, index): the faces of a seed do not depend on how many are asked for, nor on how many are
decoded at a time.
"""

import math
from collections.abc import Callable
from typing import Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

PriorName = Literal["standard", "gaussian", "mixture", "second_stage"]
Indices = Int[ArrayLike, " n"]
Drawer = Callable[[PRNGKeyArray, Indices], Array]  # from a key and indices to latents


class LatentMoments(flax.struct.PyTreeNode):
    """Mean and covariance of the aggregate posterior, as the last evaluation measured them on its split."""

    images: Float[Array, ""]  # that were measured; 0 before the first evaluation
    mean: Float[Array, " z"]
    covariance: Float[Array, "z z"]

    @classmethod
    def of(cls, mean: Float[np.ndarray, "n z"], log_variance: Float[np.ndarray, "n z"]) -> "LatentMoments":
        """Those of some posteriors."""
        return cls(*(jnp.asarray(x, jnp.float32) for x in (len(mean), *moments_of(mean, log_variance))))


def moments_of(
    mean: Float[np.ndarray, "n z"], log_variance: Float[np.ndarray, "n z"]
) -> tuple[Float[np.ndarray, " z"], Float[np.ndarray, "z z"]]:
    """Mean and covariance of the aggregate posterior q(z), the mean of the images' posteriors, in float64."""
    mean, variance = mean.astype(np.float64), np.exp(log_variance.astype(np.float64))
    covariance = np.cov(mean.T, bias=True).reshape(mean.shape[1], -1) + np.diag(variance.mean(axis=0))
    return mean.mean(axis=0), covariance


class Prior(Protocol):
    """What faces can be drawn from."""

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: float = 1.0) -> Float[Array, "n z"]:
        """The latents number `indices` of the stream `key`; `temperature` multiplies the standard deviations."""
        ...


def normal_by_index(key: PRNGKeyArray, indices: Indices, size: int) -> Float[Array, "n size"]:
    """Rows of N(0, I), each of which depends on its own index alone."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), (size,)))(indices)


class Gaussian(flax.struct.PyTreeNode):
    """A Gaussian with mean m and covariance R Rᵀ."""

    mean: Float[Array, " z"]
    root: Float[Array, "z z"]

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: float = 1.0) -> Float[Array, "n z"]:  # noqa: D102
        noise = normal_by_index(key, indices, self.mean.shape[0])
        return self.mean + temperature * noise @ self.root.T

    def log_density(self, latents: Float[Array, "n z"]) -> Float[Array, " n"]:
        """Nats."""
        # By the singular values of the root: it need not be triangular, and may be singular, where nothing is likely.
        left, values, _ = jnp.linalg.svd(self.root)
        scaled = jnp.matmul(latents - self.mean, left, precision=jax.lax.Precision.HIGHEST) / values
        return -0.5 * jnp.sum(jnp.square(scaled) + math.log(2 * math.pi) + 2 * jnp.log(values), axis=1)


class Mixture(flax.struct.PyTreeNode):
    """A mixture of Gaussians."""

    log_weights: Float[Array, " k"]
    components: Gaussian  # with a leading axis k

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: float = 1.0) -> Float[Array, "n z"]:  # noqa: D102
        choice_key, noise_key = jax.random.split(key)
        chosen = jax.vmap(lambda index: jax.random.categorical(jax.random.fold_in(choice_key, index), self.log_weights))
        which = chosen(indices)
        noise = normal_by_index(noise_key, indices, self.components.mean.shape[1])
        # One component after another: a root for every latent would be z x z numbers each.
        latents = jnp.zeros_like(noise)
        for k in range(len(self.log_weights)):
            drawn = self.components.mean[k] + temperature * noise @ self.components.root[k].T
            latents = jnp.where((which == k)[:, None], drawn, latents)
        return latents

    def log_density(self, latents: Float[Array, "n z"]) -> Float[Array, " n"]:
        """Nats."""
        each = jax.vmap(lambda component: component.log_density(latents))(self.components)
        return jax.scipy.special.logsumexp(each + self.log_weights[:, None], axis=0)


def standard(latent_dim: int) -> Gaussian:
    """N(0, I)."""
    return Gaussian(jnp.zeros(latent_dim), jnp.eye(latent_dim))


def fitted_gaussian(moments: LatentMoments) -> Gaussian:
    """The Gaussian with the mean and covariance of the aggregate posterior.

    Where the aggregate posterior is far from N(0, I), as with a strong reconstruction weight, it gives faces where the
    standard one gives noise (Ghosh et al. 2020, "From variational to deterministic autoencoders", section 4).
    """
    # The symmetric root, not Cholesky's: rounding may leave eigenvalues a little below zero, which are cut off here.
    values, vectors = jnp.linalg.eigh(moments.covariance)
    return Gaussian(moments.mean, (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T)


def drawer(prior: Prior, *, temperature: float = 1.0) -> Drawer:
    """`prior.sample`, compiled once for all temperatures, as a function of key and indices."""
    return lambda key, indices: _draw(prior, key, indices, temperature)


@jax.jit
def _draw(prior: Prior, key: PRNGKeyArray, indices: Indices, temperature: float) -> Array:
    return prior.sample(key, indices, temperature=temperature)
