"""Priors that are fitted to the aggregate posterior, kept in the run's folder, and scored."""

import pathlib
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from facevae_jax.files import atomic_writer
from facevae_jax.generation import latent_tables
from facevae_jax.generation.second_stage import SecondStage, abstract_variables, make_second_stage, train_second_stage
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.priors import Gaussian, Mixture, Prior, PriorName, normal_by_index
from facevae_jax.models.inference import Encoded
from facevae_jax.random import named_key

DIRECTORY = "priors"
COMPONENTS = (1, 2, 4, 8, 16)  # of a mixture; the number that describes validation best is taken
MIN_DRAWS = 16_384  # from the posteriors; of small data sets several from each
COVARIANCE_FLOOR = 1e-4  # added to the variances: a mixture's component may be fitted to few latents
SCORED = 4_096  # latents of validation, at most


def fitted_prior(trained: TrainedVAE, name: PriorName) -> Prior:
    """The mixture or the second stage for a model's latents; fitted once to the training split, then read.

    Raises:
      UserError: the run's data are not there.
    """
    path = kept_at(trained, name)
    kept = _read(path, name, trained.latent_dim)
    if kept is not None:
        return kept
    train = draws(trained, "train", at_least=MIN_DRAWS)
    prior: Any
    if name == "mixture":
        prior = fit_mixture(train, draws(trained, latent_tables.evaluation_split(trained), at_least=1))
    else:
        covariance = np.cov(train.T, dtype=np.float64).reshape(trained.latent_dim, -1)
        root = np.linalg.cholesky(covariance + COVARIANCE_FLOOR * np.eye(len(covariance)))
        whitening = Gaussian(jnp.asarray(train.mean(axis=0)), jnp.asarray(root, jnp.float32))
        prior = train_second_stage(train, whitening)
    _write(path, prior)
    return prior


def kept_at(trained: TrainedVAE, name: PriorName) -> pathlib.Path:
    """Where a fitted prior is kept."""
    return trained.folder / DIRECTORY / f"{name}_{trained.identity}.npz"


def draws(trained: TrainedVAE, split: str, *, at_least: int) -> Float32[np.ndarray, "n z"]:
    """Draws from the posteriors of a split: as many from each as make `at_least` in all."""
    posterior = latent_tables.encode_split(trained, split).posterior
    times = -(-at_least // len(posterior.mean))
    return np.concatenate([trained.posterior_sample(posterior, seed=seed) for seed in range(times)])


def fit_mixture(train: Float32[np.ndarray, "n z"], validation: Float32[np.ndarray, "m z"]) -> Mixture:
    """A mixture of Gaussians with full covariances, by expectation maximisation.

    More components are taken as long as they make the validation latents likelier.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    best: tuple[float, Any] = (-np.inf, None)
    for components in COMPONENTS:
        if components > len(train) // 2:
            break
        fitted = GaussianMixture(
            components, covariance_type="full", reg_covar=COVARIANCE_FLOOR, max_iter=50, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the score decides whether it is good enough
            fitted.fit(train)
        score = fitted.score(validation)
        if score <= best[0]:
            break
        best = (score, fitted)
    fitted = best[1]
    roots = np.linalg.cholesky(fitted.covariances_)
    gaussians = Gaussian(jnp.asarray(fitted.means_, jnp.float32), jnp.asarray(roots, jnp.float32))
    return Mixture(jnp.asarray(np.log(fitted.weights_), jnp.float32), gaussians)


def rate(trained: TrainedVAE, prior: Prior | PriorName, posterior: Encoded) -> float:
    """KL(q(z|x) || prior), in nats, the mean over the posteriors of at most `SCORED` images, from one draw each.

    For N(0, I) it is the KL of the loss, but for the noise of the draws; a fitted prior that describes the latents
    better has a lower one. The negative ELBO with that prior is the reconstruction term plus this. Of the second
    stage it is an upper bound.
    """
    mean, log_variance = posterior.mean[:SCORED], posterior.log_variance[:SCORED]
    noise = np.asarray(normal_by_index(named_key(0, "rate"), np.arange(len(mean)), trained.latent_dim))
    latents = mean + np.exp(0.5 * log_variance) * noise
    entropy_term = -0.5 * np.sum(np.square(noise) + log_variance + np.log(2 * np.pi), axis=1)
    distribution: Any = trained.prior(prior) if isinstance(prior, str) else prior
    return float(np.mean(entropy_term - np.asarray(_log_density(distribution, jnp.asarray(latents)))))


@jax.jit
def _log_density(distribution: Any, latents: Any) -> Any:
    return distribution.log_density(latents)


def _write(path: pathlib.Path, prior: Mixture | SecondStage) -> None:
    """Plain arrays, so that reading needs no pickle; a folder that cannot be written to costs time only."""
    if isinstance(prior, Mixture):
        arrays = {
            "log_weights": prior.log_weights,
            "mean": prior.components.mean,
            "root": prior.components.root,
        }
    else:
        leaves = jax.tree.leaves(prior.variables)
        arrays = {"mean": prior.whitening.mean, "root": prior.whitening.root, "variance": prior.variance}
        arrays |= {f"variables_{number}": leaf for number, leaf in enumerate(leaves)}
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_writer(path) as file:
            np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    except OSError:
        return


def _read(path: pathlib.Path, name: PriorName, latent_dim: int) -> Mixture | SecondStage | None:
    """What `_write` wrote; None where there is nothing whole that fits."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: jnp.asarray(file[key]) for key in file.files}
        gaussian = Gaussian(arrays["mean"], arrays["root"])
        if gaussian.mean.shape[-1] != latent_dim:
            return None
        if name == "mixture":
            return Mixture(arrays["log_weights"], gaussian)
        prior = make_second_stage(gaussian, variance=arrays["variance"])
        shapes, structure = jax.tree.flatten(abstract_variables(prior.model))
        leaves = [arrays[f"variables_{number}"] for number in range(len(shapes))]
        if any(leaf.shape != shape.shape for leaf, shape in zip(leaves, shapes, strict=True)):
            return None
        return prior.replace(variables=jax.tree.unflatten(structure, leaves))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
