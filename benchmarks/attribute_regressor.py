"""Reads the attributes off drawn faces: the measure that editing is held against, trained on what it has to read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, UInt8

from facevae_jax.config import ModelConfig
from facevae_jax.data import synthetic
from facevae_jax.models.convolution import choose_form
from facevae_jax.models.vae import Encoder, Execution, to_unit

FIRST_FACE = 2**40  # no split reaches these faces
FACES = 32_768
STEPS = 4_000  # fewer read a jaw's width with R² 0.6 off the drawn faces themselves
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
MAX_BLUR = 1.2  # pixels: decoded faces are softer than drawn ones, and must not be misread for it
NOISE = 0.01
BATCH = 256  # faces that are read at a time

Regressor = Callable[[UInt8[np.ndarray, "n r r 3"]], Float32[np.ndarray, "n a"]]


def spread() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each attribute, as they are drawn."""
    means, deviations = [], []
    for attribute in synthetic.ATTRIBUTES:
        if attribute.frequency is None:
            means.append((attribute.low + attribute.high) / 2)
            deviations.append((attribute.high - attribute.low) / 12**0.5)
        else:
            means.append(attribute.frequency)
            deviations.append((attribute.frequency * (1 - attribute.frequency)) ** 0.5)
    return np.array(means), np.array(deviations)


def standardised(indices: np.ndarray) -> Float32[np.ndarray, "n a"]:
    """The true attributes of drawn faces, in standard deviations from the mean."""
    drawn = synthetic.attributes(indices)
    mean, deviation = spread()
    values = np.stack([drawn[attribute.name] for attribute in synthetic.ATTRIBUTES], axis=1)
    return ((values - mean) / deviation).astype(np.float32)


def train_regressor(*, resolution: int, steps: int = STEPS) -> Regressor:
    """A function from faces to their standardised attributes: a convolutional network, least squares, Adam."""
    filters = tuple(min(32 * 2**stage, 128) for stage in range(resolution.bit_length() - 3))
    config = ModelConfig(latent_dim=len(synthetic.ATTRIBUTES), filters=filters, normalization="group")
    network = Encoder(config, Execution(choose_form("auto")))
    indices = FIRST_FACE + np.arange(FACES)
    images, targets = synthetic.faces(indices, resolution=resolution), standardised(indices)
    params: Any = network.init(jax.random.key(0), jnp.zeros((1, resolution, resolution, 3)), train=False)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 100, steps))

    @jax.jit
    def step(params: Any, state: Any, images: Array, targets: Array, key: Array) -> tuple[Any, Any]:
        def loss(params: Any) -> Array:
            read: Any = network.apply(params, soften(to_unit(images), key), train=True)
            return jnp.mean(jnp.square(read.mean - targets))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, draw = optimizer.init(params), np.random.default_rng(0)
    for number in range(steps):
        rows = draw.integers(0, FACES, BATCH_SIZE)
        key = jax.random.fold_in(jax.random.key(1), number)
        params, state = step(params, state, images[rows], targets[rows], key)

    @jax.jit
    def read(images: Array) -> Array:
        output: Any = network.apply(params, images, train=False)
        return output.mean

    def read_all(images: UInt8[np.ndarray, "n r r 3"]) -> Float32[np.ndarray, "n a"]:
        padded = np.pad(images, ((0, -len(images) % BATCH), (0, 0), (0, 0), (0, 0)))
        parts = [np.asarray(read(padded[at : at + BATCH])) for at in range(0, len(padded), BATCH)]
        return np.concatenate(parts)[: len(images)]

    return read_all


def soften(images: Float[Array, "b h w c"], key: Array) -> Float[Array, "b h w c"]:
    """Images blurred by a Gaussian of up to `MAX_BLUR` pixels, half of them not at all, and with noise."""
    blur_key, which_key, noise_key = jax.random.split(key, 3)
    count = images.shape[0]
    sigma = jax.random.uniform(blur_key, (count, 1), maxval=MAX_BLUR)
    sigma = jnp.maximum(sigma * jax.random.bernoulli(which_key, 0.5, (count, 1)), 1e-3)
    weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-3.0, 4.0) / sigma))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (3, 3)
        padded = jnp.pad(images, pad, mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, at, at + images.shape[axis], axis=axis) for at in range(7)]
        images = sum(weights[:, at, None, None, None] * part for at, part in enumerate(shifted))
    return images + NOISE * jax.random.normal(noise_key, images.shape)
