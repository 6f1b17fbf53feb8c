"""The discretized logistic likelihood: a probability of 8-bit pixels, in training, scores and exported files."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import facevae_jax
from facevae_jax.exporting import publishing
from facevae_jax.metrics import scores
from facevae_jax.models import vae
from facevae_jax.models.api import Execution
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood, LogisticLikelihood, LogisticMixture
from facevae_jax.training.loop import train
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import change


def probability_of(value, mean, scale, bits):
    """By scipy's distribution function, in float64; the ends take what lies outside."""
    logistic, step = scipy.stats.logistic(mean, scale), 2 ** (8 - bits)
    value -= value % step
    low = -np.inf if value == 0 else (value - 0.5 * step) / 255
    high = np.inf if value == 256 - step else (value + 0.5 * step) / 255
    return logistic.cdf(high) - logistic.cdf(low)


def test_a_likelihood_with_a_decode_of_its_own_takes_no_bias():
    class Clipped(GaussianLikelihood):
        def decode(self, raw):
            return Decoded(jnp.clip(raw, 0.0, 1.0))

    config = vae.Config(latent_dim=3, filters=(4, 8))
    images, code = jnp.full((2, 16, 16, 3), 0.3), jnp.ones((2, 3))
    losses = []
    for few_passes in (False, True):
        decoder = vae.Decoder(config, 16, Clipped(16 * 16 * 3), Execution(few_passes=few_passes))
        variables = decoder.init(jax.random.key(0), code, None, train=False)
        decoded, _ = decoder.apply(variables, code, None, train=True, mutable=["batch_stats"])
        losses.append(decoder.likelihood.terms(images, decoded).squared_error)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_and_its_gradient_of_logits_are_the_derived_ones(dtype):
    generator, likelihood = np.random.default_rng(0), GaussianLikelihood(8 * 8 * 3)
    raw = jnp.asarray(2.0 * generator.normal(size=(5, 8, 8, 3)), dtype)
    bias, factors = (jnp.asarray(generator.normal(size=size), jnp.float32) for size in (3, 5))
    images = jnp.asarray(generator.uniform(size=raw.shape), jnp.float32)

    def loss(raw, bias, decode):
        return factors @ likelihood.terms(images, decode(raw, bias)).squared_error

    def plain(raw, bias):
        return likelihood.decode(raw.astype(jnp.float32) + bias[None, None, None])

    (joint, found), (expected, gradients) = (
        jax.value_and_grad(functools.partial(loss, decode=decode), (0, 1))(raw, bias)
        for decode in (likelihood.decode_with_bias, plain)
    )
    np.testing.assert_allclose(joint, expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradients[1], rtol=1e-5, atol=1e-7)
    assert found[0].dtype == raw.dtype
    largest = float(jnp.max(jnp.abs(gradients[0])))
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * largest} if dtype == "float32" else {"rtol": 2**-7, "atol": 0}
    np.testing.assert_allclose(*(np.asarray(each[0], np.float32) for each in (found, gradients)), **tolerance)


def test_a_mixtures_probability_is_scipys():
    generator = np.random.default_rng(0)
    weights, means = np.array([0.3, 0.7]), generator.uniform(size=(2, 3))
    scales = np.array([[0.2, 0.05, 0.01], [0.1, 0.3, 0.02]])
    mixture = LogisticMixture(
        *(jnp.asarray(x, jnp.float32)[None, None] for x in (np.log(weights), means.T, np.log(scales).T))
    )
    for pixel, bits in itertools.product(((0, 255, 7), (255, 0, 128), (90, 31, 200)), (8, 5)):
        of_components = [
            math.prod(probability_of(v, m, s, bits) for v, m, s in zip(pixel, *row, strict=True))
            for row in zip(means, scales, strict=True)
        ]
        found = mixture.log_probability(jnp.asarray(pixel, jnp.float32)[None, None] / 255, bits=bits)
        assert float(found) == pytest.approx(math.log(weights @ of_components), rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(mixture.mean()[0, 0], weights @ means, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 5, 1])
@pytest.mark.parametrize("log_scale", [-7.5, -5.0, -2.5, 1.0])
@pytest.mark.parametrize("mean", [0.0, 0.4993, 1.0])
def test_the_probabilities_of_all_values_are_one(mean, log_scale, bits):
    """However narrow or wide: not so where a difference of two sigmoids is rounded away."""
    count = 2**bits
    values = jnp.arange(0, 256, 256 // count, dtype=jnp.float32)[:, None, None, None] / 255
    one = LogisticMixture(jnp.zeros((count, 1, 1, 1)), *(jnp.full((count, 1, 1, 1, 1), x) for x in (mean, log_scale)))
    assert float(jnp.sum(jnp.exp(one.log_probability(values, bits=bits)))) == pytest.approx(1.0, abs=1e-4)
    gradient = jax.grad(lambda m: jnp.sum(one._replace(means=m).log_probability(values, bits=bits)))(one.means)
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(("components", "channels"), [(1, 6), (2, 14)])
def test_a_layers_outputs_are_means_scales_and_weights(components, channels):
    likelihood = LogisticLikelihood(4 * 4 * 3, components=components)
    assert likelihood.channels(3) == channels
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, channels)), jnp.float32)
    mean, mixture, _ = likelihood.decode(raw)
    np.testing.assert_allclose(jnp.sum(jnp.exp(mixture.log_weights), axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(mixture.means[..., 1, -1], jax.nn.sigmoid(raw[..., 3 * components - 2]), rtol=1e-6)
    np.testing.assert_allclose(mixture.log_scales[..., 0, 0], raw[..., 3 * components] - 2.5, rtol=1e-5)
    np.testing.assert_array_equal(mean, mixture.mean())
    assert mean.shape == (2, 4, 4, 3)


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in (1, 3)])
def run(request, tiny_config, tmp_path_factory):
    """A trained run and what it wrote."""
    config = change(tiny_config, objective={"likelihood": "discretized_logistic", "mixture_components": request.param})
    workdir = tmp_path_factory.mktemp("logistic")
    train(config, workdir)
    return workdir, facevae_jax.load(workdir)


def test_training_learns_it_and_logs_bits_per_dim(run):
    workdir, trained = run
    lines = [line for line in read_metrics(workdir) if line["kind"] == "evaluation"]
    for line in lines:
        assert line["negative_elbo"] == pytest.approx(line["nll"] + line["kl"])
        assert line["loss"] == pytest.approx(line["negative_elbo"])
        assert line["bits_per_dim"] == pytest.approx(line["negative_elbo"] / (32 * 32 * 3 * math.log(2)))
    assert 0 < lines[-1]["bits_per_dim"] < lines[0]["bits_per_dim"]
    assert lines[-1]["bits_per_dim"] < 8  # which no model at all needs
    assert trained.sample(3, prior="gaussian").shape == (3, 32, 32, 3)


def test_scores_are_those_of_the_discrete_likelihood(run):
    workdir, trained = run
    record = scores.evaluate(trained, draws=(1, 8), bound_images=37)
    nats = record["likelihood"]
    assert "variance" not in nats
    assert nats["bits_per_dim"] == pytest.approx(nats["negative_elbo"] / (32 * 32 * 3 * math.log(2)))
    # Of other draws than the run's own evaluation.
    last = [line for line in read_metrics(workdir) if line["kind"] == "evaluation"][-1]
    assert nats["negative_elbo"] == pytest.approx(last["negative_elbo"], rel=0.01)
    bounds = record["importance"]["bounds"]
    assert bounds["1"] == pytest.approx(nats["negative_elbo"], rel=0.01)
    assert bounds["8"] < bounds["1"]
    assert record["importance"]["bits_per_dim"]["8"] == pytest.approx(bounds["8"] / (32 * 32 * 3 * math.log(2)))


def test_every_exported_form_gives_the_mean(run, tmp_path):
    """`export` compares each with the model itself, and publishes nothing that differs."""
    _, trained = run
    restored = trained.portable()
    differences = publishing.export(restored, tmp_path / "out", onnx=True)
    assert differences["decoder.onnx"].largest < 1e-5
    again = facevae_jax.load(tmp_path / "out")
    np.testing.assert_array_equal(again.sample(3), trained.sample(3))
