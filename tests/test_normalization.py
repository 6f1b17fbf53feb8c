import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from facevae_jax.models.api import Execution
from facevae_jax.models.blocks import Moments, by_channel
from facevae_jax.models.normalization import BATCH_NORM_EPSILON, BatchNorm
from facevae_jax.training.setup import DATA_AXIS, make_mesh

SHAPE = (16, 3, 5, 7)


def draw(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape).astype(np.float32))


def ours(variables, y, weights, *, devices, few_launches):
    """Normalized features and new running moments of a batch that devices have parts of."""

    def one(variables, y, weights):
        module = BatchNorm(0.9, Execution(axis=DATA_AXIS, few_launches=few_launches))
        weighted = y * weights.reshape(-1, 1, 1, 1)
        moments = Moments(jnp.sum(weighted, axis=(0, 1, 2)), jnp.sum(weighted * y, axis=(0, 1, 2)))
        (z, affine), updates = module.apply(
            variables, y, moments, jnp.zeros(SHAPE[-1]), weights=weights, train=True, mutable=["batch_stats"]
        )
        assert (affine is None) == few_launches
        return z if affine is None else z * by_channel(affine.scale, z) + by_channel(affine.shift, z), updates

    cut, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    mesh = make_mesh(jax.devices()[:devices])
    return jax.shard_map(one, mesh=mesh, in_specs=(whole, cut, cut), out_specs=(cut, whole), check_vma=False)(
        variables, y, weights
    )


def flax(variables, y):
    module = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=BATCH_NORM_EPSILON)
    return module.apply(variables, y, mutable=["batch_stats"])


def variables():
    params = {"scale": draw(1, SHAPE[-1:]), "bias": draw(2, SHAPE[-1:])}
    return {"params": params, "batch_stats": {"mean": draw(3, SHAPE[-1:]), "var": draw(4, SHAPE[-1:]) ** 2}}


def gradients(normalize):
    def loss(variables, y):
        z, updates = normalize(variables, y)
        return jnp.vdot(draw(5), jnp.tanh(z)), (z, updates)

    (_, found), of = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables(), draw(0))
    return found, of[0]["params"], of[1]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("few_launches", [False, True])
def test_batch_normalization_and_its_gradient_are_those_of_flax(few_launches, devices):
    options = {"weights": jnp.ones(SHAPE[0]), "devices": devices, "few_launches": few_launches}
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(same, gradients(functools.partial(ours, **options)), gradients(flax))


def test_padding_counts_in_no_moment_and_no_gradient():
    """Of 16 images 4 weigh nothing: as if there were 12."""
    weights = jnp.asarray([16 / 12, 16 / 12, 16 / 12, 0.0] * 4)
    real = np.flatnonzero(weights)

    def padded(variables, y):
        z, updates = ours(variables, y, weights, devices=4, few_launches=True)
        return z[real], updates

    def alone(variables, y):
        return flax(variables, y[real])

    def loss(normalize, variables, y):
        z, updates = normalize(variables, y)
        return jnp.vdot(draw(5)[real], jnp.tanh(z)), (z, updates)

    found, expected = (
        jax.value_and_grad(functools.partial(loss, normalize), argnums=(0, 1), has_aux=True)(variables(), draw(0))
        for normalize in (padded, alone)
    )
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(same, found, expected)
