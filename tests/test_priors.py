import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from facevae_jax.generation.second_stage import train_second_stage
from facevae_jax.latents.priors import Gaussian, LatentMoments, Mixture, drawer, fitted_gaussian, standard

COUNT = 100_000


@pytest.fixture(scope="module")
def root() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3))


@pytest.fixture(scope="module")
def mixture(root) -> Mixture:
    means, roots = np.array([[0.0, 0, 0], [5, -1, 2]]), np.stack([np.eye(3), root])
    return Mixture(jnp.log(jnp.array([0.25, 0.75])), Gaussian(jnp.asarray(means), jnp.asarray(roots)))


def draw(prior, seed=1, count=COUNT, **options) -> np.ndarray:
    return np.asarray(prior.sample(jax.random.key(seed), np.arange(count), **options))


def test_samples_have_the_moments_of_their_prior(root):
    moments = LatentMoments(jnp.ones(()), jnp.array([1.0, -2.0, 0.5]), jnp.asarray(root @ root.T, jnp.float32))
    error = 6 * np.abs(root @ root.T).max() / np.sqrt(COUNT)  # six standard errors, about
    gaussian = draw(fitted_gaussian(moments))
    np.testing.assert_allclose(gaussian.mean(0), moments.mean, atol=error)
    np.testing.assert_allclose(np.cov(gaussian.T), moments.covariance, atol=2 * error)
    cold = draw(fitted_gaussian(moments), temperature=0.5)
    np.testing.assert_allclose(cold.mean(0), moments.mean, atol=error)
    np.testing.assert_allclose(np.cov(cold.T), moments.covariance / 4, atol=2 * error)
    plain = draw(standard(3))
    np.testing.assert_allclose(plain.mean(0), np.zeros(3), atol=0.02)
    np.testing.assert_allclose(np.cov(plain.T), np.eye(3), atol=0.03)


def test_rounding_below_zero_does_not_spoil_the_samples():
    covariance = jnp.diag(jnp.array([1.0, 0.0, -1e-4]))  # as a difference of large float32 numbers leaves it
    latents = draw(fitted_gaussian(LatentMoments(jnp.ones(()), jnp.zeros(3), covariance)), count=1000)
    assert np.isfinite(latents).all()
    assert latents[:, 0].std() > 0.9
    np.testing.assert_array_equal(latents[:, 1:], 0.0)


def test_a_mixture_has_the_moments_of_its_components(mixture, root):
    latents = draw(mixture)
    mean = 0.75 * np.array([5.0, -1, 2])
    between = np.array([5.0, -1, 2])
    covariance = 0.25 * np.eye(3) + 0.75 * root @ root.T + 0.25 * 0.75 * np.outer(between, between)
    np.testing.assert_allclose(latents.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(latents.T), covariance, atol=0.2)


def test_densities_are_scipys(mixture, root):
    at = np.random.default_rng(1).normal(size=(20, 3)) * 3
    one = scipy.stats.multivariate_normal(np.zeros(3), np.eye(3)).logpdf(at)
    two = scipy.stats.multivariate_normal([5, -1, 2], root @ root.T).logpdf(at)
    np.testing.assert_allclose(standard(3).log_density(jnp.asarray(at)), one, rtol=1e-5)
    expected = np.logaddexp(np.log(0.25) + one, np.log(0.75) + two)
    np.testing.assert_allclose(mixture.log_density(jnp.asarray(at)), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["standard", "mixture"])
def test_a_draw_depends_on_its_own_number_alone(mixture, kind):
    sample = drawer(standard(3) if kind == "standard" else mixture)
    key = jax.random.key(3)
    alone = np.concatenate([sample(key, np.array([i])) for i in range(4)])
    np.testing.assert_allclose(sample(key, np.arange(100))[:4], alone, rtol=1e-6)


@pytest.fixture(scope="module")
def ring() -> np.ndarray:
    """Latents on a noisy circle, of which a Gaussian knows nothing, beside one dimension that is Gaussian."""
    random = np.random.default_rng(0)
    angle = random.uniform(0, 2 * np.pi, 4096)
    points = np.stack([np.cos(angle), np.sin(angle), random.normal(size=4096)], axis=1)
    return (points + random.normal(scale=0.1, size=points.shape) * [1, 1, 0]).astype(np.float32)


def test_the_second_stage_learns_what_a_gaussian_cannot(ring):
    covariance = np.cov(ring.T)
    whitening = Gaussian(jnp.asarray(ring.mean(0)), jnp.asarray(np.linalg.cholesky(covariance), jnp.float32))
    learnt = train_second_stage(ring, whitening)
    drawn = draw(learnt, count=4096)
    radii = np.linalg.norm(drawn[:, :2], axis=1)
    gaussian_radii = np.linalg.norm(draw(whitening, count=4096)[:, :2], axis=1)
    assert np.mean(np.abs(radii - 1) < 0.3) > 1.5 * np.mean(np.abs(gaussian_radii - 1) < 0.3)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.15)
    bound, plain = (float(jnp.mean(prior.log_density(jnp.asarray(ring[:512])))) for prior in (learnt, whitening))
    assert bound > plain + 0.1  # nats a latent: it describes the ring better, and what is given is a lower bound
