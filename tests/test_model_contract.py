"""A hierarchical model, written here, with nothing but `models.api`: the trainer and the tools ask no more of one.

A top group [z] with the prior N(0, I), and below it a spatial group [h, w, c] whose prior the top group predicts.
"""

import dataclasses
import sys
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import facevae_jax
from facevae_jax import models
from facevae_jax.config import ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.core import random
from facevae_jax.data.batches import row_keys
from facevae_jax.metrics import scores
from facevae_jax.metrics.likelihood import importance_bounds
from facevae_jax.models.api import Execution, Gaussian, LatentGroup, Output, image_keys, to_unit
from facevae_jax.models.autoencoder import depth_to_space, space_to_depth
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainSetup, make_mesh
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import assert_same_trees

SIDE, CHANNELS = 4, 2  # of the spatial group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["two_levels"] = "two_levels"
    latent_dim: int = 4

    def check_run(self, run: Any) -> None:
        pass


class TwoLevels(nn.Module):
    config: Config
    resolution: int
    likelihood: GaussianLikelihood

    @property
    def image_shape(self):
        return self.resolution, self.resolution, 3

    @property
    def code_shape(self):
        return (self.config.latent_dim,)

    def setup(self):
        self.patch = self.resolution // SIDE
        self.top = nn.Dense(2 * self.config.latent_dim)
        self.below, self.prior = nn.Dense(2 * CHANNELS), nn.Dense(2 * SIDE**2 * CHANNELS)
        self.pixels = nn.Dense(self.patch**2 * self.likelihood.channels(3))

    def __call__(self, images, keys, *, train):
        top, posterior = self.encode(images), Gaussian.bounded(*jnp.split(self.below(self.patches(images)), 2, axis=-1))
        code, below = (q.sample(random.substream(keys, number)) for number, q in enumerate((top, posterior)))
        groups = LatentGroup(code, top), LatentGroup(below, posterior, self.prior_of(code))
        return Output(self.decoded(code, below), groups)

    def patches(self, images):
        return space_to_depth(to_unit(images) - 0.5, self.patch)

    def prior_of(self, code):
        return Gaussian.bounded(*jnp.split(self.prior(code).reshape(-1, SIDE, SIDE, 2 * CHANNELS), 2, axis=-1))

    def decoded(self, code, below):
        grid = jnp.broadcast_to(code[:, None, None], (len(code), SIDE, SIDE, code.shape[1]))
        return self.likelihood.decode(depth_to_space(self.pixels(jnp.concatenate([grid, below], -1)), self.patch))

    def encode(self, images):
        flat = self.patches(images).reshape(images.shape[0], -1)
        return Gaussian.bounded(*jnp.split(self.top(flat), 2, axis=-1))

    def decode(self, code, keys=None, *, temperature=1.0) -> Decoded:
        prior = self.prior_of(code)
        below = prior.mean if keys is None else prior.mean + temperature * (prior.sample(keys) - prior.mean)
        return self.decoded(code, below)


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> TwoLevels:
    return TwoLevels(config, resolution, likelihood)


@pytest.fixture(scope="module")
def config(tiny_config):
    """Registers the kind as long as the tests of this module run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.KINDS, "two_levels", __name__)
        patch.setitem(sys.modules, __name__, sys.modules[__name__])
        yield RunConfig(
            data=tiny_config.data,
            model=Config(),
            objective=ObjectiveConfig(likelihood="gaussian", kl_weight=0.5, free_bits=0.01),
            train=TrainConfig(batch_size=16, steps=20, warmup_steps=0, log_every_steps=1, steps_per_dispatch=4),
        )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("levels")
    return workdir, train(config, workdir)


@pytest.fixture(scope="module")
def trained(run):
    return facevae_jax.load(run[0])


def apply(trained, *arguments, **keywords):
    return trained.module.apply(trained.variables, *arguments, **keywords)


def test_the_trainer_logs_the_rate_of_each_group(run):
    records = read_metrics(run[0])
    assert len(records) == 20 + 2
    for record in records:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl_term"], rel=1e-6)
        assert len(record["rates"]) == 2
        assert record["kl"] == pytest.approx(sum(record["rates"]), rel=1e-5)
        assert record["negative_elbo"] == pytest.approx(record["nll"] + record["kl"], rel=1e-6)
    assert records[-1]["loss"] < records[0]["loss"]


def test_stopping_and_resuming_changes_no_bit(config, run, tmp_path):
    train(config, tmp_path, should_stop=lambda step: step >= 7)
    assert_same_trees(train(config, tmp_path), run[1])


def test_evaluation_is_exact_for_a_ragged_split(config, run, trained):
    """The KL to the learned prior by the closed form in float64, of all 37 images at once."""
    images = trained.dataset.images("validation")
    loss, units, _ = Evaluator(TrainSetup.of(config, make_mesh()), images)(run[1])
    keys = row_keys(jnp.arange(37), seed=0, stream="evaluate", step=0)
    output = apply(trained, jnp.asarray(images), keys, train=False)
    assert list(units) == [4, SIDE * SIDE * CHANNELS]
    expected = []
    for _, posterior, prior in output.latents:
        m, v = (np.asarray(x, np.float64).reshape(37, -1) for x in posterior)
        if prior is None:
            expected.append(0.5 * (np.exp(v) + m**2 - 1 - v))
        else:
            n, w = (np.asarray(x, np.float64).reshape(37, -1) for x in prior)
            expected.append(0.5 * ((np.exp(v) + (m - n) ** 2) / np.exp(w) - 1 + w - v))
    np.testing.assert_allclose(loss.rates, [kl.sum(axis=1).mean() for kl in expected], rtol=1e-4)
    floored = sum(np.maximum(kl.mean(axis=0), 0.01).sum() for kl in expected)
    np.testing.assert_allclose(loss.kl_term, 0.5 * floored, rtol=1e-4)
    error = np.square(np.asarray(output.decoded.mean) - images / 255).mean()
    np.testing.assert_allclose(loss.mse, error, rtol=1e-5)


def test_bounds_grow_with_the_number_of_draws_of_all_groups(trained):
    images = trained.dataset.images("validation")
    of_model = {"likelihood": trained.likelihood, "variance": trained.variance}
    bounds = importance_bounds(trained.inference, images, **of_model, draws=(1, 4, 16))
    means = [bounds[count].mean() for count in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    record = scores.evaluate(trained, draws=())["likelihood"]
    assert len(record["rates"]) == 2
    assert -means[0] == pytest.approx(record["negative_elbo"], rel=0.02)


def test_the_group_below_a_code_is_drawn_from_its_prior(trained):
    code = jnp.asarray(trained.sample_codes(2))
    mean = apply(trained, code, method="decode").mean
    one, again = (apply(trained, code, image_keys(jax.random.key(0), 2), method="decode").mean for _ in range(2))
    other = apply(trained, code, image_keys(jax.random.key(1), 2), method="decode").mean
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    cold = apply(trained, code, image_keys(jax.random.key(0), 2), temperature=0.0, method="decode").mean
    np.testing.assert_allclose(cold, mean, atol=1e-6)
    # The draws of many keys have the moments of the prior.
    prior = apply(trained, code[:1], method="prior_of")
    draws = Gaussian(*(jnp.repeat(x, 4_000, axis=0) for x in prior)).sample(image_keys(jax.random.key(2), 4_000))
    np.testing.assert_allclose(draws.mean(axis=0), prior.mean[0], atol=0.1)
    np.testing.assert_allclose(jnp.log(draws.var(axis=0)), prior.log_variance[0], atol=0.15)


def test_the_tools_work_on_the_code_of_the_top_group(trained):
    images = trained.dataset.images("validation")[:3]
    assert trained.encode(images).mean.shape == (3, 4)
    assert trained.sample(3).shape == trained.reconstruct(images).shape == images.shape
    np.testing.assert_array_equal(trained.sample(3), trained.sample(3))
