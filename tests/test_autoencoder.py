"""The spatial autoencoder: its codes are grids [h, w, c], and everything works on it as on a flat VAE."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import facevae_jax
from facevae_jax.config import ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.data.batches import row_keys
from facevae_jax.generation import verbs
from facevae_jax.models import autoencoder
from facevae_jax.models.api import Execution, image_keys
from facevae_jax.models.autoencoder import depth_to_space, space_to_depth
from facevae_jax.objective import gaussian_kl
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainSetup, build_model, make_mesh
from tests.conftest import assert_same_trees, change
from tests.test_step import losses_by_hand


@pytest.fixture(scope="module")
def config(tiny_config):
    return RunConfig(
        data=tiny_config.data,
        model=autoencoder.Config(latent_channels=2, width=8),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=16, steps=10, warmup_steps=0, steps_per_dispatch=4),
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spatial")
    return workdir, train(config, workdir)


@pytest.fixture(scope="module")
def trained(run):
    return facevae_jax.load(run[0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_space_to_depth_moves_squares_and_depth_to_space_moves_them_back(size):
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    deep = space_to_depth(x, size)
    assert deep.shape == (2, 8 // size, 12 // size, 3 * size**2)
    np.testing.assert_array_equal(deep[1, 1, 2], x[1, size : 2 * size, 2 * size : 3 * size].ravel())
    np.testing.assert_array_equal(depth_to_space(deep, size), x)


@pytest.mark.parametrize("downsampling", [4, 8])
def test_forms_agree_in_loss_and_gradients(config, downsampling):
    config = change(config, model={"downsampling": downsampling})
    images, keys = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)), image_keys(jax.random.key(1), 4)
    plain, matmul = (build_model(config, Execution(form))[0] for form in ("plain", "matmul"))
    assert plain.code_shape == (32 // downsampling, 32 // downsampling, 2)
    variables = jax.jit(lambda key: plain.init(key, images, keys, train=False))(jax.random.key(2))
    variables = jax.tree.map(lambda leaf: leaf + 0.05, variables)  # a fresh residual block adds nothing

    def loss(variables, model):
        output = model.apply(variables, images, keys, train=True)
        return jnp.mean(jnp.square(output.decoded.mean - images)) + 1e-3 * jnp.mean(output.latents[0].value)

    value_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max() + 1e-3))

    jax.tree.map(close, value_and_gradient(variables, matmul), value_and_gradient(variables, plain))


def test_one_and_eight_devices_have_the_same_losses(config):
    long_warmup = change(config, train={"warmup_steps": 100})
    one, eight = (losses_by_hand(long_warmup, devices=devices, steps=4) for devices in (1, 8))
    np.testing.assert_allclose(one, eight, rtol=1e-5)


def test_stopping_and_resuming_changes_no_bit(config, run, tmp_path):
    train(config, tmp_path, should_stop=lambda step: step >= 4)
    assert_same_trees(train(config, tmp_path), run[1])


def test_evaluation_is_exact_for_a_ragged_split(config, run, trained):
    images = trained.dataset.images("validation")
    loss, units, _ = Evaluator(TrainSetup.of(config, make_mesh()), images)(run[1])
    keys = row_keys(jnp.arange(37), seed=0, stream="evaluate", step=0)
    posterior = trained.module.apply(trained.variables, jnp.asarray(images), method="encode")
    decoded = trained.module.apply(trained.variables, posterior.sample(keys), method="decode").mean
    assert list(units) == [4 * 4 * 2]
    np.testing.assert_allclose(loss.mse, np.square(np.asarray(decoded) - images / 255).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.kl, gaussian_kl(posterior).reshape(37, -1).sum(axis=1).mean(), rtol=1e-4)
    expected = 0.5 * 3072 * np.log(2 * np.pi * loss.variance) + 0.5 * 3072 * loss.mse / loss.variance
    np.testing.assert_allclose(loss.nll, expected, rtol=1e-5)


def test_codes_are_grids_and_tools_may_hold_them_flat(trained):
    images = trained.dataset.images("validation")[:5]
    posterior = trained.encode(images)
    assert posterior.mean.shape == posterior.log_variance.shape == (5, 4, 4, 2)
    assert trained.posterior_sample(posterior).shape == (5, 4, 4, 2)
    flat = posterior.mean.reshape(5, -1)
    np.testing.assert_array_equal(trained.decode(posterior.mean), trained.decode(flat))
    np.testing.assert_array_equal(trained.decode(flat), trained.reconstruct(images))
    assert trained.code_size == 32
    assert trained.moments.covariance.shape == (32, 32)
    for prior in ("standard", "gaussian"):
        assert trained.sample(2, prior=prior).shape == (2, 32, 32, 3)


@pytest.mark.parametrize("verb", ["sample", "reconstruct", "interpolate", "morph", "edit", "traverse"])
def test_every_verb_draws_a_sheet(trained, tmp_path, verb):
    binary = next(attribute.name for attribute in trained.dataset.attributes if attribute.kind == "binary")
    given = {
        "sample": {"count": 4},
        "morph": {"rows": (0, 1)},
        "edit": {"attribute": (binary,), "rows": (0,)},
        "traverse": {"dimensions": (3, 31)},
    }
    request = verbs.Request(output=str(tmp_path / "x.png"), split="validation", **given.get(verb, {}))
    if verb in ("sample", "traverse"):
        request = dataclasses.replace(request, split=None)
    getattr(verbs, verb)(trained, request)
    assert (tmp_path / "x.png").stat().st_size > 0


def test_encoded_files_hold_grids(trained, tmp_path):
    verbs.encode(trained, verbs.Request(output=str(tmp_path / "codes.npz"), split="validation"))
    with np.load(tmp_path / "codes.npz") as file:
        assert file["mean"].shape == (37, 4, 4, 2)
        np.testing.assert_allclose(file["mean"], trained.encode(trained.dataset.images("validation")).mean, atol=1e-5)
