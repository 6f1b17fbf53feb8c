import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from facevae_jax.latents.moments import Moments, moments_of
from facevae_jax.latents.priors.base import log_density, sampler
from facevae_jax.latents.priors.gaussian import GaussianPrior, StandardPrior
from facevae_jax.latents.priors.mixture import MixturePrior
from tests.codes import Codes

COUNT = 100_000


@pytest.fixture(scope="module")
def root() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3))


@pytest.fixture(scope="module")
def mixture(root) -> MixturePrior:
    means, roots = np.array([[0.0, 0, 0], [5, -1, 2]]), np.stack([np.eye(3), root])
    return MixturePrior.of(np.array([0.25, 0.75]), means, roots)


def points(codes) -> Codes:
    return Codes(codes, np.full_like(codes, -20.0))


def draw(prior, seed=1, count=COUNT, **options) -> np.ndarray:
    return np.asarray(prior.sample(jax.random.key(seed), np.arange(count), **options))


def test_samples_have_the_moments_of_their_prior(root, mixture):
    moments, between = Moments(np.array([1.0, -2.0, 0.5]), root @ root.T, 1), np.array([5.0, -1, 2])
    of_mixture = 0.25 * np.eye(3) + 0.75 * root @ root.T + 0.25 * 0.75 * np.outer(between, between)
    for prior, temperature, mean, covariance in (
        (GaussianPrior.of(moments), 1.0, moments.mean, moments.covariance),
        (GaussianPrior.of(moments), 0.5, moments.mean, moments.covariance / 4),
        (StandardPrior.of_size(3), 1.0, np.zeros(3), np.eye(3)),
        (mixture, 1.0, 0.75 * between, of_mixture),
    ):
        latents, largest = draw(prior, temperature=temperature), np.diag(covariance).max()
        # Six standard errors, about.
        np.testing.assert_allclose(latents.mean(0), mean, atol=6 * np.sqrt(largest / COUNT))
        np.testing.assert_allclose(np.cov(latents.T), covariance, atol=6 * largest * np.sqrt(2 / COUNT))


def test_rounding_below_zero_does_not_spoil_the_samples():
    covariance = np.diag([1.0, 0.0, -1e-4])  # as a difference of large numbers leaves it
    latents = draw(GaussianPrior.of(Moments(np.zeros(3), covariance, 1)), count=1000)
    assert np.isfinite(latents).all()
    assert latents[:, 0].std() > 0.9
    np.testing.assert_array_equal(latents[:, 1:], 0.0)


def test_densities_are_scipys(mixture, root):
    at = np.random.default_rng(1).normal(size=(20, 3)) * 3
    one = scipy.stats.multivariate_normal(np.zeros(3), np.eye(3)).logpdf(at)
    two = scipy.stats.multivariate_normal([5, -1, 2], root @ root.T).logpdf(at)
    np.testing.assert_allclose(StandardPrior.of_size(3).log_density(jnp.asarray(at)), one, rtol=1e-5)
    expected = np.logaddexp(np.log(0.25) + one, np.log(0.75) + two)
    np.testing.assert_allclose(mixture.log_density(jnp.asarray(at)), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["standard", "mixture"])
def test_a_draw_depends_on_its_own_number_alone(mixture, kind):
    sample = sampler(StandardPrior.of_size(3) if kind == "standard" else mixture)
    key = jax.random.key(3)
    alone = np.concatenate([sample(key, np.array([i])) for i in range(4)])
    np.testing.assert_allclose(sample(key, np.arange(100))[:4], alone, rtol=1e-6)


def test_moments_of_posteriors_count_their_own_variances(root):
    random = np.random.default_rng(2)
    mean, log_variance = random.normal(size=(2, 50, 3)).astype(np.float32)
    found = moments_of(mean, log_variance)
    expected = mean.T @ mean / 50 - np.outer(mean.mean(0), mean.mean(0)) + np.diag(np.exp(log_variance).mean(0))
    np.testing.assert_allclose(found.mean, mean.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-4, atol=1e-6)
    assert found.images == 50


def test_a_mixture_finds_its_clusters(mixture):
    found = MixturePrior.fit(points(draw(mixture, count=4096)))
    likely = np.exp(found.log_weights) > 0.1
    np.testing.assert_allclose(sorted(np.asarray(found.components.mean)[likely][:, 0])[0], 0.0, atol=0.2)
    again = MixturePrior.from_arrays(found.to_arrays())
    at = draw(mixture, count=16)
    np.testing.assert_allclose(log_density(again, at), log_density(found, at), rtol=1e-5)
