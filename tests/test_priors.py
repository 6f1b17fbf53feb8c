import jax
import jax.numpy as jnp
import numpy as np

from facevae_jax.latents.priors import LatentMoments, sample_prior


def test_samples_have_the_moments_of_their_prior():
    random = np.random.default_rng(0)
    root = random.normal(size=(3, 3))
    moments = LatentMoments(jnp.ones(()), jnp.array([1.0, -2.0, 0.5]), jnp.asarray(root @ root.T, jnp.float32))
    count = 100_000
    error = 6 * np.abs(root @ root.T).max() / np.sqrt(count)  # six standard errors, about
    gaussian = np.asarray(sample_prior("gaussian", jax.random.key(1), count, moments))
    np.testing.assert_allclose(gaussian.mean(0), moments.mean, atol=error)
    np.testing.assert_allclose(np.cov(gaussian.T), moments.covariance, atol=2 * error)
    standard = np.asarray(sample_prior("standard", jax.random.key(1), count, moments))
    np.testing.assert_allclose(standard.mean(0), np.zeros(3), atol=0.02)
    np.testing.assert_allclose(np.cov(standard.T), np.eye(3), atol=0.03)


def test_rounding_below_zero_does_not_spoil_the_samples():
    covariance = jnp.diag(jnp.array([1.0, 0.0, -1e-4]))  # as a difference of large float32 numbers leaves it
    moments = LatentMoments(jnp.ones(()), jnp.zeros(3), covariance)
    latents = np.asarray(sample_prior("gaussian", jax.random.key(2), 1000, moments))
    assert np.isfinite(latents).all()
    assert latents[:, 0].std() > 0.9
    np.testing.assert_array_equal(latents[:, 1:], 0.0)
