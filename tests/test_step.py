"""A step called from a notebook, a model under jit, vmap and grad, and the parts of a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import facevae_jax
from facevae_jax.config import TrainConfig
from facevae_jax.data.batches import Batch, Chunk
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.feed import packed as as_rows
from facevae_jax.data.feed import put
from facevae_jax.data.plan import PADDING, padded_rows
from facevae_jax.models import autoencoder, hierarchical
from facevae_jax.models.likelihoods import make_likelihood
from facevae_jax.training.optimizer import ADAM_EPSILON, make_optimizer, make_schedule
from facevae_jax.training.packing import Joined, Packing
from facevae_jax.training.setup import TrainSetup, create_state, make_mesh, replicated, split_along
from facevae_jax.training.step import train_step, train_steps
from tests.conftest import change

HIERARCHY = hierarchical.Config(
    encoder_blocks="32d2,16d4,4d4,1x1", decoder_blocks="1x1,4m1,16m4,32m16", width=8, latent_channels=2
)


@pytest.mark.parametrize(
    "model",
    [
        None,
        pytest.param(autoencoder.Config(latent_channels=2, width=8), marks=pytest.mark.slow),
        pytest.param(HIERARCHY, marks=pytest.mark.slow),
    ],
    ids=["flat and batch-normalized", "spatial", "hierarchical"],
)
def test_a_notebooks_steps_are_the_same_on_one_and_on_eight_devices(tiny_config, model):
    """The warm-up is long: sums in another order differ by rounding, which Adam multiplies by its rate."""
    config = change(tiny_config, train={"warmup_steps": 100})
    config = dataclasses.replace(config, model=model or config.model)
    images, found = open_dataset(config.data).images("train"), []
    for devices in (1, 8):
        setup = TrainSetup.of(config, make_mesh(jax.devices()[:devices]))
        step, state = jax.jit(functools.partial(train_step, setup=setup)), create_state(setup)
        for number in range(20):
            rows = np.arange(number * 16, (number + 1) * 16) % len(images)
            batch = Batch(*(put(array, split_along(setup.mesh, 0)) for array in (images[rows], rows)))
            state, metrics = step(state, batch)
            found.append(float(metrics.loss.loss))
    np.testing.assert_allclose(found[:20], found[20:], rtol=1e-5)
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["matmul", "plain"])
def test_a_batch_of_15_is_the_same_batch_on_1_2_4_and_8_devices(tiny_config, form):
    """Padding counts in no mean: not in the loss, the moments of batch normalization or their gradients."""
    config = change(
        tiny_config,
        train={"warmup_steps": 100, "batch_size": 15, "convolution": form},
        model={"dropout_rate": 0.25},
        data={"flip": True},
    )
    images, found = open_dataset(config.data).images("train"), {}
    for devices in (1, 2, 4, 8):
        setup = TrainSetup.of(config, make_mesh(jax.devices()[:devices]))
        step, state = jax.jit(functools.partial(train_step, setup=setup)), create_state(setup)
        losses = []
        for number in range(4):
            rows = np.arange(number * 15, (number + 1) * 15, dtype=np.int32)[None]
            rows = padded_rows(rows, parts=1, devices=devices)[0]
            given = (images[np.where(rows == PADDING, 63, rows)], rows)  # of padding, any image
            state, metrics = step(state, Batch(*(put(array, split_along(setup.mesh, 0)) for array in given)))
            losses.append(float(metrics.loss.loss))
        found[devices] = losses, jax.device_get((state.params, state.batch_stats))
    for devices in (2, 4, 8):
        np.testing.assert_allclose(found[devices][0], found[1][0], rtol=1e-5)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        jax.tree.map(same, found[devices][1], found[1][1])


@pytest.mark.parametrize(
    ("accumulation", "model", "arrays"),
    # 5 trees in vectors beside the counters and the decoder's variance; without batch statistics 3
    [
        (1, None, 11),
        pytest.param(2, None, 11, marks=pytest.mark.slow),
        pytest.param(1, autoencoder.Config(latent_channels=2, width=8), 9, marks=pytest.mark.slow),
    ],
    ids=["whole", "in parts", "without batch statistics"],
)
def test_a_packed_state_takes_the_same_steps(tiny_config, accumulation, model, arrays):
    """Parameters, moments and averages in vectors, as on a GPU: only the sum in the norm has another order.

    A warm-up keeps Adam from amplifying rounding differences, as in test_processes.
    """
    config = change(
        tiny_config, train={"accumulation": accumulation, "clip_norm": 1.0, "ema_decay": 0.9, "warmup_steps": 20}
    )
    config = dataclasses.replace(config, model=model or config.model)
    images = open_dataset(config.data).images("train")
    setup = TrainSetup.of(config, make_mesh(jax.devices()[:2]))
    state = create_state(setup)
    packing = Packing.of(state)
    packed = jax.jit(packing.pack)(state)
    assert len(jax.tree.leaves(packed)) == arrays
    jax.tree.map(np.testing.assert_array_equal, packing.unpack(packed, like=state), state)
    leaves, structure = jax.tree.flatten(packed)
    unlike = jax.tree.unflatten(structure, [leaf + number for number, leaf in enumerate(leaves, 1)])
    joined = Joined.of(unlike)
    assert joined.short.keys() == {"float32", "int32"}
    jax.tree.map(np.testing.assert_array_equal, joined.part(packed), unlike)
    step = jax.jit(functools.partial(train_step, setup=setup, packing=packing))
    plain_step = jax.jit(functools.partial(train_step, setup=setup))
    for number in range(4):
        rows = np.arange(number * 16, (number + 1) * 16)
        batch = Batch(*(put(array, split_along(setup.mesh, 0)) for array in (images[rows], rows)))
        packed, metrics = step(packed, batch)
        state, expected = plain_step(state, batch)
        np.testing.assert_allclose(metrics.loss.loss, expected.loss.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.gradient_norm, expected.gradient_norm, rtol=1e-5)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, packing.unpack(packed, like=state), state)


@pytest.mark.parametrize("padding", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_a_dispatch_as_on_an_accelerator_takes_the_same_steps(tiny_config, padding, accelerator):
    """The same up to rounding, also with padding.

    On a GPU the state lies in a few vectors and the sums of batch normalization are joined. On a TPU sums are sent as
    they are, and the error's gradient is computed with the error.

    The activation is smooth, since rounding decides the slope of a leaky one at zero.
    """
    size, model = 16 - padding, {"activation": "silu"}
    config = change(tiny_config, train={"warmup_steps": 100, "batch_size": size}, data={"flip": True}, model=model)
    images = open_dataset(config.data).images("train")
    rows = np.arange(3 * size, dtype=np.int32).reshape(3, size)
    rows = np.stack([padded_rows(each[None], parts=1, devices=4)[0] for each in rows])
    mesh, found = make_mesh(jax.devices()[:4]), []
    for platform in ("cpu", accelerator):
        setup = TrainSetup.of(config, mesh)
        few = {"few_launches": platform == "gpu", "few_passes": platform == "tpu"}
        execution = setup.execution._replace(**few)
        setup = setup._replace(model=setup.model.clone(execution=execution), execution=execution)
        chunk = Chunk(put(as_rows(images), replicated(mesh)), put(rows, split_along(mesh, 1)))
        steps = jax.jit(functools.partial(train_steps, setup=setup, capacity=4))
        first, metrics = steps(create_state(setup), chunk, jnp.int32(1))
        last, others = steps(first, chunk, jnp.int32(3))
        assert last.step == 4
        found.append(
            jax.device_get((first.opt_state, last._replace(params=(), opt_state=()), metrics.loss, others.loss))
        )
    for other, plain in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=2e-5 * np.abs(plain).max())


def test_a_models_module_works_under_jit_vmap_and_grad(finished, tiny_config):
    """As the docstring of `TrainedModel` shows."""
    model = facevae_jax.load(finished[0])
    images = open_dataset(tiny_config.data).images("validation")[:3]

    @jax.jit
    def reconstruct(images):
        posterior = model.module.apply(model.variables, images, method="encode")
        return model.module.apply(model.variables, posterior.mean, method="decode").mean

    np.testing.assert_allclose(np.round(255 * reconstruct(images)), model.reconstruct(images), atol=1)
    one_by_one = jax.vmap(lambda image: reconstruct(image[None])[0])(jnp.asarray(images))
    np.testing.assert_allclose(one_by_one, reconstruct(images), atol=1e-5)

    def brightness(code):
        return jnp.mean(model.module.apply(model.variables, code[None], method="decode").mean)

    code = jnp.asarray(model.encode(images).mean[0])
    gradient = jax.grad(brightness)(code)
    assert gradient.shape == code.shape == model.code_shape
    assert brightness(code + gradient) > brightness(code)


def test_learning_rate_rises_and_falls_as_configured():
    cosine = make_schedule(TrainConfig(learning_rate=2.0, schedule="cosine", warmup_steps=10), total_steps=110)
    np.testing.assert_allclose([cosine(step) for step in (0, 5, 10, 60, 110)], [0.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)
    constant = make_schedule(TrainConfig(learning_rate=2.0, warmup_steps=4), total_steps=9)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 4, 9)], [0.0, 0.5, 2.0, 2.0], rtol=1e-6)
    assert make_schedule(TrainConfig(learning_rate=2.0, warmup_steps=0), total_steps=9)(0) == 2.0


@pytest.mark.parametrize(
    ("settings", "of_optax"),
    [
        ({}, functools.partial(optax.adam, eps=ADAM_EPSILON)),
        ({"beta1": 0.8, "beta2": 0.9}, functools.partial(optax.adam, b1=0.8, b2=0.9, eps=ADAM_EPSILON)),
        (
            {"optimizer": "adamw", "weight_decay": 0.1},
            functools.partial(optax.adamw, eps=ADAM_EPSILON, weight_decay=0.1),
        ),
        ({"optimizer": "adamax", "beta2": 0.99}, functools.partial(optax.adamax, b2=0.99)),
    ],
)
def test_optimizers_are_those_of_optax(settings, of_optax):
    config = TrainConfig(learning_rate=0.1, warmup_steps=3, **settings)
    ours = make_optimizer(config, total_steps=9)
    theirs = of_optax(make_schedule(config, total_steps=9))
    params = {"a": jnp.linspace(-1.0, 1.0, 7), "b": jnp.full((2, 3), 1e-3)}
    states = ours.init(params), theirs.init(params)
    assert jax.tree.structure(states[0][1]) == jax.tree.structure(states[1])  # beside the clipping's
    for step in range(5):
        gradients = jax.tree.map(lambda leaf, step=step: 10.0 ** (2 - 2 * step) * jnp.sin(leaf + step), params)
        found, state = jax.jit(ours.update)(gradients, states[0], params)
        expected, other = jax.jit(theirs.update)(gradients, states[1], params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), found, expected)
        states, params = (state, other), optax.apply_updates(params, found)


def test_clipping_limits_the_first_moment():
    gradients = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0)}  # of norm 10
    optimizer = make_optimizer(TrainConfig(clip_norm=1.0), total_steps=1)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.size(leaf) == 4]
    np.testing.assert_allclose(sorted(float(leaf[0]) for leaf in moments)[-2:], [0.1 * 0.3, 0.1 * 0.4], rtol=1e-5)


def test_optimal_variance_has_the_gradient_of_the_log_error(tiny_config):
    """Rybkin et al. 2021: with the optimal variance the likelihood is D/2 log(mse) up to a constant."""
    likelihood = make_likelihood(change(tiny_config, objective={"likelihood": "gaussian"}).objective, (32, 32, 3))

    def nll(mse):
        variance = likelihood.batch_variance(mse, {})
        return 0.5 * 3072 * (jnp.log(2 * jnp.pi * variance) + mse / variance)

    np.testing.assert_allclose(jax.grad(nll)(0.03), 0.5 * 3072 / 0.03, rtol=1e-5)
