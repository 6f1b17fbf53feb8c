import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from facevae_jax.latents.moments import Moments
from facevae_jax.latents.priors import flow, flow_fit
from facevae_jax.latents.priors.base import log_density, sampler
from facevae_jax.latents.priors.flow import FlowPrior
from facevae_jax.latents.priors.gaussian import GaussianPrior
from tests.codes import Codes

RING = 2.0  # radius of codes that no Gaussian describes


def ring(count=1024, **options):
    angle = np.random.default_rng(0).uniform(0, 2 * math.pi, count)
    mean = np.stack([RING * np.cos(angle) + 1.0, RING * np.sin(angle)], axis=1).astype(np.float32)
    return Codes(mean, np.full_like(mean, 2 * math.log(0.3)), **options)


@pytest.fixture(autouse=True)
def as_users_fit(monkeypatch):
    """Not the few steps of the other tests; the codes are short."""
    monkeypatch.setattr(flow_fit, "STEPS", (400, 400))
    monkeypatch.setattr(flow, "WIDTH", 64)


@pytest.fixture(scope="module")
def fitted():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flow_fit, "STEPS", (400, 400))
        patched.setattr(flow, "WIDTH", 64)
        return FlowPrior.fit(ring())


def draw(prior, count=2000, **options):
    return np.asarray(prior.sample(jax.random.key(1), np.arange(count), **options))


def grid(low, high, count):
    axis = np.linspace(low, high, count)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    return (points + np.array([1.0, 0.0])).astype(np.float32), (axis[1] - axis[0]) ** 2


def random_flow(size=2, scale=0.15, shape=None, known=0):
    """A flow whose velocity was never fitted, so that no part of it is zero."""
    network = flow.network_for(shape or (size,))
    zeros = jnp.zeros((1, size)), jnp.zeros(1), jnp.zeros((1, 2 * known))
    params = network.init(jax.random.key(0), *zeros)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    noisy = [leaf + scale * other / math.sqrt(len(leaf)) for leaf, other in zip(leaves, noise, strict=True)]
    moments = Moments(np.arange(size) / size, np.eye(size) + 0.3, 1)
    return FlowPrior(
        GaussianPrior.of(moments), jax.tree.unflatten(structure, noisy), jnp.full((1, known), jnp.nan), network
    )


def test_a_flow_learns_what_no_gaussian_describes(fitted):
    radius = np.linalg.norm(draw(fitted) - [1.0, 0.0], axis=1)
    assert np.mean(np.abs(radius - RING) < 1.0) > 0.97  # 3.3 standard deviations; of the Gaussian's samples 62%
    held_out = draw(fitted, 500)
    gaussian = GaussianPrior.of(ring().moments())
    assert np.mean(log_density(fitted, held_out)) > np.mean(gaussian.log_density(jnp.asarray(held_out))) + 0.4


@pytest.mark.parametrize("prior", ["fitted", pytest.param("random", marks=pytest.mark.slow)])
def test_the_density_integrates_to_one(fitted, prior):
    points, area = grid(-6, 6, 121)
    density = np.exp(np.asarray(log_density(fitted if prior == "fitted" else random_flow(), points)))
    assert abs(density.sum() * area - 1.0) < 0.01


def test_the_density_is_that_of_the_samples(fitted):
    """The share of samples in each quarter of the plane is the integral of the density over it."""
    points, area = grid(-6, 6, 121)
    density = np.exp(np.asarray(log_density(fitted, points))) * area
    samples = draw(fitted, 20_000)
    for x in (-1, 1):
        for y in (-1, 1):
            inside = [((codes - [1.0, 0.0]) * [x, y] > 0).all(axis=1) for codes in (points, samples)]
            assert abs(density[inside[0]].sum() - inside[1].mean()) < 0.02


def test_gaussian_codes_have_the_gaussians_density():
    root = np.array([[1.0, 0.5], [0.0, 2.0]])
    mean = (np.random.default_rng(0).normal(size=(4096, 2)) @ root).astype(np.float32)
    codes = Codes(mean, np.full_like(mean, -20.0))
    at = mean[:500]
    exact = scipy.stats.multivariate_normal(np.zeros(2), root.T @ root).logpdf(at)
    assert np.abs(np.asarray(log_density(FlowPrior.fit(codes), at)) - exact).mean() < 0.05


def test_a_flow_without_a_velocity_is_the_gaussian():
    codes = ring()
    gaussian = GaussianPrior.of(codes.moments())
    network = flow.network_for((2,))
    params = network.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros((1, 0)))["params"]
    start = FlowPrior(gaussian, params, jnp.zeros((1, 0)), network)
    np.testing.assert_allclose(draw(start, temperature=0.7), draw(gaussian, temperature=0.7), rtol=1e-5, atol=1e-5)
    at = draw(gaussian, 100)
    np.testing.assert_allclose(log_density(start, at), log_density(gaussian, at), rtol=1e-4)


def test_few_codes_are_not_learned_by_heart():
    """Where nothing beats the Gaussian on held-out codes, the flow stays one."""
    random = np.random.default_rng(0)
    few, others = (random.normal(size=(16, 8)).astype(np.float32) for _ in range(2))

    class Few(Codes):
        def posteriors(self, split):
            mean = few if split == "train" else others
            return mean, np.full_like(mean, -8.0)

    prior = FlowPrior.fit(Few(few, np.full_like(few, -8.0)))
    y = random.normal(size=(100, 8)).astype(np.float32)
    assert np.mean(np.square(prior.velocity(jnp.asarray(y), 0.5, prior.unlabeled))) < 0.05


@pytest.mark.parametrize("shape", [(6,), pytest.param((2, 2, 3), marks=pytest.mark.slow)])
def test_a_draw_depends_on_its_own_number_alone(shape):
    prior = random_flow(math.prod(shape), shape=shape)
    sample, key = sampler(prior), jax.random.key(3)
    alone = np.concatenate([sample(key, np.array([i])) for i in range(4)])
    np.testing.assert_allclose(sample(key, np.arange(100))[:4], alone, rtol=1e-4, atol=1e-5)


def test_the_estimated_trace_is_that_of_the_exact_one(monkeypatch):
    prior, at = random_flow(8), np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    exact = np.asarray(prior.log_density(jnp.asarray(at)))
    monkeypatch.setattr(flow, "EXACT_TRACE", 4)
    monkeypatch.setattr(flow, "PROBES", 256)
    estimated = np.asarray(prior.log_density(jnp.asarray(at)))
    np.testing.assert_allclose(estimated, exact, atol=0.5)
    assert abs(np.mean(estimated - exact)) < 0.1


def test_a_fit_to_grids_is_the_same_on_eight_devices(monkeypatch):
    """Of the velocities: attention does not depend on the bias of its keys, which Adam moves by rounding errors."""
    monkeypatch.setattr(flow_fit, "STEPS", (10, 10))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32))
    priors = [FlowPrior.fit(ring(512, shape=(1, 2, 1), devices=count)) for count in (1, 8)]
    one, many = (np.asarray(prior.velocity(y, 0.5, prior.unlabeled)) for prior in priors)
    assert np.abs(one).max() > 0.01
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=2e-5)


def test_a_fit_that_was_stopped_continues_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(flow_fit, "STEPS", (200, 200))
    whole, codes = FlowPrior.fit(ring(512)), ring(512)
    assert FlowPrior.fit(codes, seconds=0.0) is None  # too slow: left unfinished
    assert codes.place.saves == 1
    step = codes.place.saved[max(codes.place.saved, key=int)]
    assert step == flow_fit.DISPATCH
    jax.tree.map(np.testing.assert_array_equal, whole.params, FlowPrior.fit(codes).params)


def test_a_fit_compiles_nothing_while_it_predicts_its_time(monkeypatch):
    """Else these steps seem slow, and a fit that would end in time is left unfinished."""
    monkeypatch.setattr(flow_fit, "STEPS", (410, 410))
    traced, after = [], []
    is_late = flow_fit.Pace.is_late

    def listen(event, duration, **_):
        traced.append(event)

    def noting(pace, step, steps):
        after.append(len(traced))
        return is_late(pace, step, steps)

    monkeypatch.setattr(flow_fit.Pace, "is_late", noting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        FlowPrior.fit(ring(512))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert after[0] > 0
    assert len(after) == 9
    assert len(set(after)) == 1


def test_a_flow_is_read_as_it_was_written():
    prior = random_flow(12, shape=(2, 2, 3), known=2)
    again = FlowPrior.from_arrays(prior.to_arrays())
    np.testing.assert_array_equal(draw(again, 8), draw(prior, 8))
    assert again.network == prior.network


def test_wanted_labels_decide_where_the_codes_are():
    """Codes left or right, and up or down, of which any part may be asked for."""
    sides = np.random.default_rng(0).choice([-1.0, 1.0], (1024, 2)).astype(np.float32)
    prior = FlowPrior.fit(Codes(2.0 * sides, np.full_like(sides, 2 * math.log(0.3)), labels=sides))
    left = draw(prior.given(np.array([-1.0, np.nan])), 500)
    assert np.mean(left[:, 0] < 0) > 0.97
    assert 0.35 < np.mean(left[:, 1] < 0) < 0.65
    corner = draw(prior.given(np.array([1.0, -1.0])), 500)
    assert np.mean((corner[:, 0] > 0) & (corner[:, 1] < 0)) > 0.95
    free = draw(prior, 500)
    assert 0.35 < np.mean(free[:, 0] < 0) < 0.65


def test_other_labels_are_those_of_the_nearest_images(monkeypatch):
    monkeypatch.setattr(flow, "NEAREST", 2)
    labels = np.array([[0, 5], [1, 6], [1, 7], [np.nan, 8], [3, 9]], np.float32)
    prior = dataclasses.replace(random_flow(known=2), labels=jnp.asarray(labels))
    np.testing.assert_array_equal(prior.given(np.array([1.2, np.nan])).labels, np.float32([[1.2, 6], [1.2, 7]]))
    np.testing.assert_array_equal(prior.given(np.array([1.0, 6.0])).labels, np.float32([[1, 6], [1, 6]]))


@pytest.mark.parametrize(("values", "guidance"), [([0.0, 1.0], flow.GUIDANCE), ([0.0, 1.0, 2.0], 1.0)])
def test_binary_labels_alone_guide(values, guidance):
    """A flow that was kept is guided as one that was just fitted."""
    labels = np.float32([[value, np.nan] for value in values])
    prior = FlowPrior.from_arrays(random_flow(known=2).to_arrays() | {"labels": labels})
    assert prior.guidance == guidance
    fitted = FlowPrior.fit(ring(512, labels=np.random.default_rng(0).choice(values, (512, 1)).astype(np.float32)))
    assert fitted.guidance == guidance


@pytest.mark.parametrize(("known", "deviation"), [(0, 1.0), (2, flow.NOISE)])
def test_samples_with_labels_start_from_less_noise(known, deviation):
    """A flow whose velocity is zero leaves the noise as it is: the Gaussian."""
    prior = random_flow(known=known)
    prior = dataclasses.replace(prior, params=jax.tree.map(jnp.zeros_like, prior.params))
    gaussian = GaussianPrior(*prior.gaussian)
    mean = np.asarray(prior.gaussian.mean)
    np.testing.assert_allclose(draw(prior, 64) - mean, deviation * (draw(gaussian, 64) - mean), atol=1e-5)
