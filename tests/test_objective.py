import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from facevae_jax.config import ObjectiveConfig
from facevae_jax.models.api import Gaussian, LatentGroup, Output
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood, PixelTerms, make_likelihood
from facevae_jax.objective import ImageTerms, gaussian_kl, image_terms, kl_weight, log_ratio, loss_of


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, 0.0), (1.5, 0.7), (-0.3, -2.0), (0.0, 1e-4)])
@pytest.mark.parametrize("prior", [None, (0.4, -0.5)])
def test_kl_is_the_integral(mean, log_variance, prior):
    posterior, against = (stats.norm(m, np.exp(0.5 * v)) for m, v in ((mean, log_variance), prior or (0.0, 0.0)))
    expected, _ = integrate.quad(lambda z: posterior.pdf(z) * (posterior.logpdf(z) - against.logpdf(z)), -20, 20)
    q, p = (g and Gaussian(*(jnp.full((1, 1), x) for x in g)) for g in ((mean, log_variance), prior))
    np.testing.assert_allclose(gaussian_kl(q, p)[0, 0], expected, rtol=1e-5, atol=1e-8)


def test_log_ratio_of_the_draws_is_scipys():
    """Over a top group with the prior N(0, I) and a spatial one whose prior the model gives."""
    random = np.random.default_rng(0)
    groups, expected = [], np.zeros(2)
    for shape, learned in (((2, 3), False), ((2, 4, 4, 2), True)):
        value, *q = random.normal(size=(3, *shape))
        p = random.normal(size=(2, *shape)) if learned else np.zeros((2, *shape))
        densities = [stats.norm(m, np.exp(v / 2)).logpdf(value).reshape(2, -1).sum(axis=1) for m, v in (p, q)]
        expected += densities[0] - densities[1]
        groups.append(LatentGroup(*jax.tree.map(jnp.float32, (value, Gaussian(*q), Gaussian(*p) if learned else None))))
    found = log_ratio(Output(Decoded(jnp.zeros((2, 4, 4, 3))), tuple(groups)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_image_terms_average_over_pixels_and_keep_images_and_dimensions_apart():
    images = jnp.zeros((2, 4, 4, 3))
    reconstruction = images.at[0, 0, 0, 0].set(0.5)
    posterior = Gaussian(jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.zeros((2, 2)))
    output = Output(Decoded(reconstruction), (LatentGroup(posterior.mean, posterior),))
    terms = image_terms(images, output, GaussianLikelihood(48))
    np.testing.assert_allclose(terms.pixels.squared_error, [0.25 / 48, 0.0])
    np.testing.assert_allclose(terms.kl[0], [[0.0, 0.5], [2.0, 0.0]])


def loss(mse=0.02, kl=(1.0, 3.0), finer=(), variance=0.1, weight=1.0, shape=(4, 4, 3), nll=70.0, **settings):
    config = ObjectiveConfig(**settings)
    pixels = PixelTerms(jnp.asarray(mse), jnp.asarray(nll))
    likelihood = make_likelihood(config, shape)
    means = ImageTerms(pixels, (jnp.asarray(kl), *finer))
    return loss_of(means, variance=jnp.asarray(variance), kl_weight=weight, likelihood=likelihood, config=config)


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
    shape = (128, 128, 3)
    variance = make_likelihood(ObjectiveConfig(), shape).batch_variance(jnp.zeros(()), {})
    assert float(variance) == pytest.approx(2.4576)

    def gradient(likelihood):
        return jax.grad(lambda mse: loss(mse=mse, variance=variance, shape=shape, likelihood=likelihood).loss)(0.02)

    np.testing.assert_allclose(gradient("gaussian"), gradient("mse"), rtol=1e-6)
    result = loss(variance=variance, shape=shape)
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


def test_free_bits_of_a_group_are_shared_by_its_dimensions():
    def term(kl):
        return loss(kl=kl[0], finer=kl[1:], weight=0.5, free_bits=2.0, free_bits_per="group").kl_term

    kl = jnp.array([0.5, 0.9]), jnp.array([[0.1, 3.0]])
    np.testing.assert_allclose(term(kl), 0.5 * (2.0 + 3.1))
    jax.tree.map(np.testing.assert_allclose, jax.grad(term)(kl), (jnp.zeros(2), jnp.full((1, 2), 0.5)))


def test_groups_of_a_resolution_have_a_weight_of_their_own():
    def result(**settings):
        finer = [jnp.full((side, side, 2), 1.0) for side in (4, 8, 8)]
        return loss(kl=jnp.ones((1, 1, 2)), finer=finer, weight=0.5, kl_weights="4:3,8:0.25", **settings)

    np.testing.assert_allclose(result().kl_term, 0.5 * (2 + 3 * 32 + 0.25 * 2 * 128))
    np.testing.assert_allclose(result(free_bits=40.0, free_bits_per="group").kl_term, 0.5 * (40 + 3 * 40 + 64))
    np.testing.assert_allclose(result().negative_elbo - result().nll, 2 + 32 + 256)  # the bound has no weights
    # A weight holds up to the next one, and a vector stands at 1x1.
    np.testing.assert_allclose(loss(kl=jnp.ones(3), finer=[jnp.ones((16, 16, 1))], kl_weights="8:2").kl_term, 3 + 512)


def test_kl_warmup_is_linear_and_ends_at_the_weight():
    config = ObjectiveConfig(kl_weight=0.5, kl_warmup_steps=9)
    weights = [float(kl_weight(config, jnp.asarray(step))) for step in range(12)]
    np.testing.assert_allclose(weights[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(weights[9:], 0.5)
    assert float(kl_weight(ObjectiveConfig(), jnp.asarray(0))) == 1.0
