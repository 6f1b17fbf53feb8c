"""Models whose arrays look like trained ones, at no cost, for tests of what is written and computed from them."""

import functools
import math

import jax
import numpy as np

from facevae_jax.config import RunConfig
from facevae_jax.latents.moments import Moments
from facevae_jax.trained.model import Restored, TrainedModel
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh, make_model

STEP = 7


def scattered(tree, *, seed):
    """Arrays of a tree's shapes, as far from a new model's biases of 0 and scales of 1 as a trained one's are."""
    random = np.random.default_rng(seed)

    def make_leaf(path, leaf):
        noise = random.normal(size=leaf.shape).astype(np.float32)
        match jax.tree_util.keystr(path[-1:], simple=True):
            case "kernel":
                return noise * np.float32(2 / math.sqrt(math.prod(leaf.shape[:-1])))
            case "var":
                return np.exp(noise)
            case "scale":
                return 1 + np.float32(0.3) * noise
        return np.float32(0.3) * noise

    return jax.tree_util.tree_map_with_path(make_leaf, tree)


def scattered_state(config: RunConfig):
    """A state that looks like a trained one, at no cost; numpy arrays."""
    state = abstract_state(TrainSetup.of(config, make_mesh()))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return zeros._replace(
        params=scattered(state.params, seed=1),
        batch_stats=scattered(state.batch_stats, seed=2),
        averaged=None if state.averaged is None else scattered(state.averaged, seed=3),
    )


def scattered_model(config: RunConfig) -> Restored:
    state, root = scattered_state(config), np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    variables, variance = jax.device_put((state.evaluation_variables, state.decoder_variance))
    return Restored(config, variables, variance, STEP, Moments(np.arange(8, dtype=np.float32) / 10, root @ root.T, 37))


def random_model(config: RunConfig, folder) -> TrainedModel:
    """A model as commands load it from a run: the moments are fitted when they are needed."""
    return TrainedModel(scattered_model(config)._replace(moments=None), folder=folder, mesh=make_mesh())


def expected(restored, images, latents):
    """Posterior and images in [0, 1], by the model in the form that runs here."""
    model, _ = make_model(restored.config)
    encode, decode = (jax.jit(functools.partial(model.apply, method=method)) for method in ("encode", "decode"))
    posterior, decoded = encode(restored.variables, images), decode(restored.variables, latents).mean
    assert np.std(posterior.mean) > 0.1  # else any program would do
    assert np.std(decoded) > 0.1
    return jax.device_get((posterior, decoded))


def inputs(count, config):
    random = np.random.default_rng(count)
    model, _ = make_model(config)
    images = random.integers(0, 256, (count, *model.image_shape), np.uint8)
    return images, random.normal(size=(count, *model.code_shape)).astype(np.float32)
