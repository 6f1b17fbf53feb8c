"""A layer block by block is the layer of the whole batch: values, moments and every gradient."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig
from facevae_jax.models import autoencoder, blocks, hierarchical, vae
from facevae_jax.models.api import Execution, image_keys, to_unit
from facevae_jax.models.blocks import add_by_channel, apply_layer, block_size
from facevae_jax.models.convolution import convolution, transposed_convolution
from facevae_jax.objective import image_terms
from facevae_jax.training.setup import make_model


def layer(shared, x, extras):
    weight, bias = shared
    return jnp.tanh(x / 2 @ weight + bias[None, None, None]) * extras[:, None, None, None]


@pytest.mark.parametrize(("moments", "weighted"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (3, 2), (1, 3), (2, 4)])
def test_blocks_agree_with_the_whole_batch(blocks, block, dtype, moments, weighted):
    batch = blocks * block
    keys = jax.random.split(jax.random.key(0), 8)
    x = (2 * jnp.abs(jax.random.normal(keys[0], (batch, 3, 2, 4)))).astype(dtype)
    shared = (jax.random.normal(keys[1], (4, 5)), jax.random.normal(keys[2], (5,)))
    extras = jax.random.bernoulli(keys[3], 0.5, (batch,)).astype(jnp.int32)
    of_images = jax.random.bernoulli(keys[6], 0.7, (batch,)).astype(jnp.float32) if weighted else None
    weights = jax.random.normal(keys[4], (batch, 3, 2, 5)), *jax.random.normal(keys[5], (2, 5))

    @functools.partial(jax.jit, static_argnames="block")
    def value_and_gradients(**cut):
        def scalar(shared, x):
            y, sums = apply_layer(layer, shared, x, extras, moments=moments, weights=of_images, **cut)
            assert (sums is not None) == moments
            return sum(jnp.vdot(w, part) for w, part in zip(weights, (y, *(sums or ())), strict=False))

        return jax.value_and_grad(scalar, argnums=(0,) if dtype == np.uint8 else (0, 1))(shared, x)

    whole = value_and_gradients(block=0)
    cut = value_and_gradients(block=block)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), cut, whole)


def test_a_block_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="divisor"):
        apply_layer(lambda _, x, __: x, None, jnp.ones((8, 2, 2, 1)), None, block=3, moments=False)


def arrays(program, operation):
    """Numbers in each result of an operation in a compiled program's text, the largest first."""
    shapes = re.findall(rf"= f32\[([\d,]+)\]\S* {operation}\(", program)
    return sorted((math.prod(map(int, shape.split(","))) for shape in shapes), reverse=True)


@pytest.mark.parametrize("kind", ["dense", "transposed"])
def test_no_layer_copies_its_outputs(kind):
    """Copies of the same zeros, for each layer's output and for each gradient, took 2% of a step.

    Those of a transposed convolution's block, of which XLA computed the last part twice, took 1%.
    """

    def function(weight, x, _):
        return jnp.tanh(x @ weight) if kind == "dense" else transposed_convolution(x, weight, form="matmul")

    def loss(weights, x):
        for weight in weights:
            y, sums = apply_layer(function, weight, x, None, block=2, moments=True)
            x = y[:, :32, :32] * sums.total[None, None, None] * sums.square[None, None, None]
        return x.sum()

    x, weights = jnp.ones((16, 32, 32, 8)), [jnp.ones((8, 8) if kind == "dense" else (3, 3, 8, 8))] * 3
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile().as_text()
    copied, block_of_output = arrays(program, "copy"), 4 * x[:2].size
    assert copied  # small ones: the pattern matches this compiler's text
    assert copied[0] < (x.size if kind == "dense" else block_of_output)


@pytest.mark.parametrize("kind", ["strided", "transposed"])
def test_patches_are_written_once(kind):
    """Taps that were arrays of their own before they were joined took 2% of a step, and copies of patches as much."""
    strided = kind == "strided"
    function = functools.partial(convolution, stride=2) if strided else transposed_convolution
    x, kernel = jnp.ones((4, *((32, 32) if strided else (16, 16)), 8)), jnp.ones((3, 3, 8, 8))
    patches = 2 * 16 * 16 * kernel[..., 0].size  # of a block

    def layer(kernel, x, _):
        return function(jnp.tanh(x), kernel, form="matmul")

    def loss(kernel, x):
        return (apply_layer(layer, kernel, x, None, block=2, moments=False)[0] ** 2).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(kernel, x).compile().as_text()
    assert patches in arrays(program, "fusion")
    assert patches not in arrays(program, "copy") + arrays(program, "concatenate")


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_a_bias_has_the_same_gradients(channels):
    keys = jax.random.split(jax.random.key(0), 3)
    x, slope = jax.random.normal(keys[0], (2, 2, 6, 10, channels))
    bias = jax.random.normal(keys[1], (channels,))
    value, pull_back = jax.vjp(add_by_channel, x, bias)
    expected, expected_pull_back = jax.vjp(lambda x, bias: x + bias[None, None, None], x, bias)
    np.testing.assert_array_equal(value, expected)
    for actual, same in zip(pull_back(slope), expected_pull_back(slope), strict=True):
        np.testing.assert_allclose(actual, same, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 2000), image_bytes=st.integers(1, 2**24))
def test_a_block_divides_the_batch_and_fits(batch, image_bytes):
    size = block_size(batch, image_bytes=image_bytes)
    assert batch % size == 0
    assert size == 1 or size * image_bytes <= blocks.BLOCK_BYTES
    assert not [s for s in range(size + 1, batch + 1) if batch % s == 0 and s * image_bytes <= blocks.BLOCK_BYTES]


HIERARCHY = hierarchical.Config(
    encoder_blocks="16d4,4x1,4d4",
    decoder_blocks="1x1,4m1,16m4",
    width=8,
    latent_channels=2,
    patch=2,
    rematerialize=True,
)


@pytest.mark.parametrize(
    "model",
    [
        # A smooth activation: rounding moves no value across a kink, where the gradient jumps.
        *(
            vae.Config(activation="silu", normalization=n, dropout_rate=0.2, kernel_size=4, filters=(16, 32))
            for n in ("batch", "group", "none")
        ),
        *(
            pytest.param(autoencoder.Config(latent_channels=2, width=8, downsampling=d), marks=pytest.mark.slow)
            for d in (4, 8)
        ),
        pytest.param(HIERARCHY, marks=pytest.mark.slow),
    ],
    ids=["batch", "group", "none", "spatial, 4", "spatial, 8", "hierarchical"],
)
def test_forms_agree_in_loss_and_gradients(model, monkeypatch):
    """Whole models, with dropout, several blocks a layer, a kernel of 4, and pixels as they are stored."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**16)
    config = RunConfig(data=DataConfig(resolution=32), model=model, objective=ObjectiveConfig(likelihood="gaussian"))
    pixels = jax.random.randint(jax.random.key(0), (6, 32, 32, 3), 0, 256).astype(jnp.uint8)
    images = to_unit(pixels)
    key = jax.random.key(1)
    keys = image_keys(key, 6)
    variables = make_model(config)[0].init(key, images, keys, train=False)
    # Away from the exact zeros and ones of a fresh model.
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), variables)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])

    @functools.partial(jax.jit, static_argnames="form")
    def losses(params, form):
        module, likelihood = make_model(config, Execution(form))

        def loss(params):
            given = images if form == "plain" else pixels
            output, updates = module.apply(
                {**variables, "params": params}, given, keys, train=True, mutable=["batch_stats"]
            )
            terms = image_terms(images, output, likelihood)
            return 100 * jnp.mean(terms.pixels.squared_error) + jnp.mean(terms.kl[0]), updates

        return jax.value_and_grad(loss, has_aux=True)(params)

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max() + 1))

    jax.tree.map(close, losses(variables["params"], "matmul"), losses(variables["params"], "plain"))
