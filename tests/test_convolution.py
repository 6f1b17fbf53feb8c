import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facevae_jax.models import vae
from facevae_jax.models.api import Execution
from facevae_jax.models.convolution import convolution, transposed_convolution
from facevae_jax.models.layers import (
    LEAKY_RELU_SLOPE,
    Features,
    SameConvolution,
    Stage,
    StridedConvolution,
    TransposedConvolution,
    UpsampledConvolution,
)
from facevae_jax.models.normalization import BATCH_NORM_EPSILON

PAIRS = [
    (SameConvolution, lambda f, k: nn.Conv(f, (k, k))),
    (StridedConvolution, lambda f, k: nn.Conv(f, (k, k), strides=2)),
    (TransposedConvolution, lambda f, k: nn.ConvTranspose(f, (k, k), strides=(2, 2), transpose_kernel=True)),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["same", "strided", "transposed"])
@pytest.mark.parametrize("form", ["plain", "matmul"])
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_parameters_and_results_are_those_of_flax(ours, theirs, form, size):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 5))
    reference = theirs(7, size)
    variables = reference.init(jax.random.key(1), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # so that the bias counts
    layer = ours(7, vae.Config(kernel_size=size), Execution(form))
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(1), Features(x)))
    assert shapes == jax.tree.map(jnp.shape, variables)
    features, moments = layer.apply(variables, Features(x))
    bias = variables["params"]["bias"]
    np.testing.assert_array_equal(features.bias, bias)  # which batch normalization would take away again
    expected = reference.apply(variables, x)
    bias = bias.reshape(1, 1, 1, -1)
    np.testing.assert_allclose(features.raw + bias, expected, rtol=1e-5, atol=1e-5)
    expected -= bias
    np.testing.assert_allclose(moments.total, expected.sum(axis=(0, 1, 2)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(moments.square, jnp.square(expected).sum(axis=(0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("form", ["plain", "matmul"])
@pytest.mark.parametrize("size", [3, 5])
def test_upsampling_is_flax_convolution_of_repeated_pixels(form, size):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))
    reference, layer = nn.Conv(7, (size, size)), UpsampledConvolution(7, vae.Config(kernel_size=size), Execution(form))
    repeated = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    variables = reference.init(jax.random.key(1), repeated)
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(1), Features(x)))
    assert shapes == jax.tree.map(jnp.shape, variables)
    expected, pull_back = jax.vjp(lambda v: reference.apply(v, repeated), variables)
    found, ours = jax.vjp(lambda v: layer.apply(v, Features(x))[0].raw, variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    at = jax.random.normal(jax.random.key(2), expected.shape)
    kernels = (pull(at)[0]["params"]["kernel"] for pull in (ours, pull_back))
    np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["nearest", "transposed"])
def test_only_the_transposed_head_gives_constant_features_a_checkerboard(head):
    layer = {"nearest": UpsampledConvolution, "transposed": TransposedConvolution}[head]
    ones = Features(jnp.ones((1, 8, 8, 5)))
    layer = layer(3, vae.Config(), Execution(), hidden=False)
    y = layer.apply(layer.init(jax.random.key(0), ones), ones)[0].raw[0, 4:-4, 4:-4]
    assert (np.ptp(y, axis=(0, 1)).max() < 1e-5) == (head == "nearest")


@pytest.mark.parametrize("train", [True, False])
def test_normalization_is_that_of_flax_with_the_bias_that_is_left_out(train):
    """Of the running mean too, so that a checkpoint means the same."""
    config = vae.Config(batch_norm_momentum=0.7)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 5))

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            features = Stage(config, Execution(), name="stage")(
                StridedConvolution(7, config, Execution(), name="conv")(Features(x)), None, train=train
            )
            return features.value(config)

    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(7, (3, 3), strides=2, name="conv")(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.7, epsilon=BATCH_NORM_EPSILON, name="norm")
            return nn.leaky_relu(norm(y), LEAKY_RELU_SLOPE)

    given = jax.tree.map(lambda leaf: leaf + 0.1, Theirs().init(jax.random.key(1), x))
    ours = {
        kind: {"stage": {"BatchNorm_0": tree["norm"]}} | ({"conv": tree["conv"]} if "conv" in tree else {})
        for kind, tree in given.items()
    }
    expected, new = Theirs().apply(given, x, mutable=["batch_stats"])
    found, updated = Ours().apply(ours, x, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, updated["batch_stats"]["stage"]["BatchNorm_0"], new["batch_stats"]["norm"])


@pytest.mark.parametrize("stride", [1, 2, None], ids=["same", "strided", "transposed"])
@example(size=4, batch=2, height=8, width=8, channels=3, features=5, seed=0)  # pads a column before
@example(size=6, batch=2, height=8, width=6, channels=3, features=5, seed=0)  # pads pairs of columns on both sides
@settings(max_examples=3, deadline=None)
@given(
    size=st.integers(2, 6),
    batch=st.integers(1, 3),
    height=st.sampled_from([2, 4, 6, 16]),
    width=st.sampled_from([2, 8, 10]),
    channels=st.integers(1, 9),
    features=st.integers(1, 9),
    seed=st.integers(0, 2**20),
)
def test_forms_agree_in_value_and_gradients(stride, size, batch, height, width, channels, features, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (batch, height, width, channels))
    io = (features, channels) if stride is None else (channels, features)
    size += stride == 1 and size % 2 == 0  # of stride 1 sides are odd
    function = functools.partial(convolution, stride=stride) if stride else transposed_convolution
    kernel = jax.random.normal(keys[1], (size, size, *io))

    @functools.partial(jax.jit, static_argnames="form")
    def value_and_gradients(x, kernel, form):
        value, vjp = jax.vjp(lambda x, k: function(x, k, form=form), x, kernel)
        return value, *vjp(jax.random.normal(keys[2], value.shape))

    plain, fast = (value_and_gradients(x, kernel, form) for form in ("plain", "matmul"))
    for expected, actual in zip(plain, fast, strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["strided", "transposed"])
def test_products_sum_multiples_of_4_numbers_of_a_patch(name):
    """Kernels of 3 x 3 x 3 give 27, which take half as long again as 28."""
    function = transposed_convolution if name == "transposed" else functools.partial(convolution, stride=2)
    x, kernel = jnp.ones((1, 8, 8, 8 if name == "transposed" else 3)), jnp.ones((3, 3, 3, 8))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel, form="matmul")))

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
    products = re.findall(r"dot_general.*contracting_dims = \[([\d, ]+)\] x .*: \(tensor<([\dx]+)xf32>", program)
    terms = [math.prod(int(shape.split("x")[int(axis)]) for axis in axes.split(",")) for axes, shape in products]
    assert 28 in terms
    assert not [count for count in terms if count % 4]


def test_products_give_rows_of_multiples_of_16_numbers():
    """Kernels of 3 x 3 x 3 give 27, which take half as long again as 32."""
    x, kernel = jnp.ones((1, 8, 8, 8)), jnp.ones((3, 3, 3, 8))
    program = jax.jit(functools.partial(transposed_convolution, form="matmul")).lower(x, kernel).as_text()
    rows = [int(shape.split("x")[-1]) for shape in re.findall(r"dot_general.* -> tensor<([\dx]+)xf32>", program)]
    assert rows == [32]


def test_pairs_of_columns_of_few_channels_are_padded_together():
    """Padding in loops over 3 numbers takes three times as long."""
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 8))
    program = jax.jit(functools.partial(convolution, stride=2, form="matmul")).lower(x, kernel).as_text()
    assert "1x9x5x6" in re.findall(r"stablehlo.pad .* -> tensor<([\dx]+)xf32>", program)


@pytest.mark.parametrize("name", ["strided", "transposed"])
@pytest.mark.parametrize(("channels", "features"), [(3, 16), (16, 16), (3, 32)])  # the last is narrower as patches
def test_gradients_of_kernels_are_products_that_xla_has_a_fast_form_for(name, channels, features):
    """No left operand is transposed, and the transpose is read from memory.

    Fused with an activation, XLA would compute that again, number by number in the order of the transpose.
    """
    transposed = name == "transposed"
    function = transposed_convolution if transposed else functools.partial(convolution, stride=2)
    x = jnp.ones((1, 32, 32, features if transposed else channels))
    kernel = jnp.ones((3, 3, channels, features))

    def loss(kernel, x):
        return jnp.sum(jnp.tanh(function(jnp.sin(x), kernel, form="matmul")))

    program = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    contracted = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}", program)
    assert contracted
    assert set(contracted) == {"1"}
    transposing = [part for part in program.split("\n\n") if re.search(r" (transpose|copy)\(", part)]
    assert transposing
    loops = [part for part in transposing if not part.startswith("ENTRY")]
    assert not [loop for loop in loops if re.search(r" (sine|tanh|multiply)\(", loop)]


def test_what_follows_a_gradient_does_not_compute_it_number_by_number():
    """XLA put the sums of shifted taps into the loop of the activation's gradient, with a branch for every number."""

    def loss(x, kernel, slope):
        return jnp.vdot(slope, convolution(nn.leaky_relu(x, 0.3), kernel, stride=2, form="matmul"))

    x, kernel, slope = jnp.ones((1, 32, 32, 16)), jnp.ones((3, 3, 16, 32)), jnp.ones((1, 16, 16, 32))
    program = jax.jit(jax.grad(loss)).lower(x, kernel, slope).compile().as_text()
    loops = [part for part in program.split("\n\n") if "fused_computation" in part.split("(")[0]]
    assert loops
    assert not [loop for loop in loops if "concatenate(" in loop]
