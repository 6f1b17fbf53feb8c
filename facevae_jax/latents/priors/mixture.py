"""A mixture of Gaussians with full covariances, fitted by scikit-learn."""

import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from facevae_jax.core.progress import progress_bar
from facevae_jax.latents.priors.base import FitData, Indices, normal_by_index
from facevae_jax.latents.priors.gaussian import Gaussian

COMPONENTS = (1, 2, 4, 8, 16)  # tried in turn
MIN_DRAWS = 16_384  # from the posteriors; several from each for small data sets
COVARIANCE_FLOOR = 1e-4  # added to the variances, since a component may be fitted to few codes


class Mixture(NamedTuple):
    """Weights and components of a mixture."""

    log_weights: Float[Array, " k"]
    components: Gaussian  # with a leading axis k


class MixturePrior(Mixture):
    """A mixture of Gaussians with as many components as the validation codes support."""

    label: ClassVar[str] = "Mixture of Gaussians"
    description: ClassVar[str] = "a mixture of Gaussians, fitted to the posteriors of the training split"

    @classmethod
    def fit(cls, data: FitData) -> "MixturePrior":
        """See `fit_mixture`."""
        return cls.of(*fit_mixture(data.draws("train", at_least=MIN_DRAWS), data.draws("evaluation")))

    @classmethod
    def of(
        cls, weights: Float[np.ndarray, " k"], means: Float[np.ndarray, "k z"], roots: Float[np.ndarray, "k z z"]
    ) -> "MixturePrior":
        """From weights, and means and roots of the covariances."""
        gaussians = Gaussian(jnp.asarray(means, jnp.float32), jnp.asarray(roots, jnp.float32))
        return cls(jnp.asarray(np.log(weights), jnp.float32), gaussians)

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: Any = 1.0) -> Float[Array, "n z"]:  # noqa: D102
        choice_key, noise_key = jax.random.split(key)
        chosen = jax.vmap(lambda index: jax.random.categorical(jax.random.fold_in(choice_key, index), self.log_weights))
        which = chosen(indices)
        noise = normal_by_index(noise_key, indices, self.components.mean.shape[1])
        # One component at a time: gathering the root of every code would need z x z numbers each.
        codes = jnp.zeros_like(noise)
        for k in range(len(self.log_weights)):
            drawn = self.components.mean[k][None] + temperature * noise @ self.components.root[k].T
            codes = jnp.where((which == k)[:, None], drawn, codes)
        return codes

    def log_density(self, codes: Float[Array, "n z"]) -> Float[Array, " n"]:  # noqa: D102
        each = jax.vmap(lambda component: component.log_density(codes))(self.components)
        return jax.scipy.special.logsumexp(each + self.log_weights[:, None], axis=0)

    def to_arrays(self) -> dict[str, np.ndarray]:  # noqa: D102
        means, roots = (np.asarray(array) for array in self.components)
        return {"weights": np.exp(np.asarray(self.log_weights, np.float64)), "means": means, "roots": roots}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "MixturePrior":  # noqa: D102
        return cls.of(arrays["weights"], arrays["means"], arrays["roots"])


def fit_mixture(
    train: Float32[np.ndarray, "n z"], validation: Float32[np.ndarray, "m z"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and roots of the covariances, by expectation maximization.

    The number of components grows as long as the validation codes become more likely.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture  # takes a second to import

    best: tuple[float, Any] = (-np.inf, None)
    with progress_bar(total=sum(COMPONENTS), description="fitting the mixture", unit="component") as bar:
        for components in COMPONENTS:
            if components > len(train) // 2:
                break
            fitted = GaussianMixture(
                components, covariance_type="full", reg_covar=COVARIANCE_FLOOR, max_iter=50, random_state=0
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the validation score decides
                fitted.fit(train)
            bar.update(components)
            score = fitted.score(validation)
            if score <= best[0]:
                break
            best = (score, fitted)
    fitted = best[1]
    return fitted.weights_, fitted.means_, np.linalg.cholesky(fitted.covariances_)
