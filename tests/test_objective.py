import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from facevae_jax.config import ObjectiveConfig
from facevae_jax.models.vae import Decoded, Output, Posterior
from facevae_jax.objective import fixed_variance, gaussian_kl, image_terms, kl_weight, negative_elbo


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, 0.0), (1.5, 0.7), (-0.3, -2.0), (0.0, 1e-4)])
def test_kl_is_the_integral(mean, log_variance):
    posterior, prior = stats.norm(mean, np.exp(0.5 * log_variance)), stats.norm(0, 1)
    expected, _ = integrate.quad(lambda z: posterior.pdf(z) * (posterior.logpdf(z) - prior.logpdf(z)), -20, 20)
    actual = gaussian_kl(Posterior(jnp.full((1, 1), mean), jnp.full((1, 1), log_variance)))
    np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-5, atol=1e-8)


def test_image_terms_average_over_pixels_and_keep_images_and_dimensions_apart():
    images = jnp.zeros((2, 4, 4, 3))
    reconstruction = images.at[0, 0, 0, 0].set(0.5)
    posterior = Posterior(jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.zeros((2, 2)))
    terms = image_terms(images, Output(Decoded(reconstruction), posterior))
    np.testing.assert_allclose(terms.squared_error, [0.25 / 48, 0.0])
    np.testing.assert_allclose(terms.kl, [[0.0, 0.5], [2.0, 0.0]])


def loss(mse=0.02, kl=(1.0, 3.0), variance=0.1, weight=1.0, dimensions=48, discrete_nll=70.0, **config):
    return negative_elbo(
        jnp.asarray(mse),
        jnp.asarray(kl),
        discrete_nll=jnp.asarray(discrete_nll),
        variance=jnp.asarray(variance),
        kl_weight=weight,
        dimensions=dimensions,
        config=ObjectiveConfig(**config),
    )


def test_the_papers_loss():
    result = loss(likelihood="mse", r_loss_factor=10_000.0)
    np.testing.assert_allclose(result.loss, 10_000 * 0.02 + 4.0, rtol=1e-6)
    np.testing.assert_allclose(result.kl, 4.0)


def test_gaussian_nll_is_scipys():
    random = np.random.default_rng(0)
    x, mean, variance = random.uniform(size=48), random.uniform(size=48), 0.03
    expected = -stats.norm(mean, np.sqrt(variance)).logpdf(x).sum()
    result = loss(mse=np.mean((x - mean) ** 2), variance=variance, likelihood="gaussian")
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5)
    np.testing.assert_allclose(result.loss, expected + 4.0, rtol=1e-5)
    np.testing.assert_allclose(result.negative_elbo, expected + 4.0, rtol=1e-5)


def test_r_loss_factor_is_a_variance():
    """At 128x128 and 10,000, D / (2 r) = 2.458; then both likelihoods have the same gradient in mse."""
    config, dimensions = ObjectiveConfig(), 128 * 128 * 3
    variance = fixed_variance(config, dimensions=dimensions)
    assert variance == pytest.approx(2.4576)

    def gradient(likelihood):
        return jax.grad(
            lambda mse: loss(mse=mse, variance=variance, dimensions=dimensions, likelihood=likelihood).loss
        )(0.02)

    np.testing.assert_allclose(gradient("gaussian"), gradient("mse"), rtol=1e-6)
    result = loss(variance=variance, dimensions=dimensions)
    np.testing.assert_allclose(result.equivalent_r_loss_factor, 10_000.0, rtol=1e-6)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "discretized_logistic"])
def test_the_total_is_the_sum_of_its_parts(likelihood):
    result = loss(likelihood=likelihood, weight=0.3, free_bits=2.0)
    assert float(result.loss) == float(result.reconstruction + result.kl_term)
    assert (float(result.reconstruction) == 70.0) == (likelihood == "discretized_logistic")


def test_free_bits_cost_nothing_and_pull_nothing():
    def term(kl):
        return loss(kl=kl, free_bits=2.0).kl_term

    kl = jnp.array([0.5, 3.0])
    np.testing.assert_allclose(term(kl), 2.0 + 3.0)
    np.testing.assert_allclose(jax.grad(term)(kl), [0.0, 1.0])
    np.testing.assert_allclose(loss(kl=kl, free_bits=2.0).kl, 3.5)  # what is reported is the true KL


def test_kl_warmup_is_linear_and_ends_at_the_weight():
    config = ObjectiveConfig(kl_weight=0.5, kl_warmup_steps=9)
    weights = [float(kl_weight(config, jnp.asarray(step))) for step in range(12)]
    np.testing.assert_allclose(weights[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(weights[9:], 0.5)
    assert float(kl_weight(ObjectiveConfig(), jnp.asarray(0))) == 1.0
