"""A network that reads the attributes off drawn faces, which `benchmarks.editing` compares edits with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from benchmarks.networks import encoder, fit, in_batches
from facevae_jax.data.drawn import synthetic
from facevae_jax.models.api import to_unit

FIRST_FACE = 2**40  # outside all splits
FACES = 32_768
STEPS = 4_000  # with fewer, R² of a jaw's width is 0.6 on the drawn faces themselves
BATCH_SIZE = 64
MAX_BLUR = 1.2  # pixels: decoded faces are softer than drawn ones, which must not change what is read
NOISE = 0.01

Regressor = Callable[[UInt8[np.ndarray, "n r r 3"]], Float32[np.ndarray, "n a"]]


def spread() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [a] of each attribute's distribution."""
    ranges = [(a.low, a.high, a.frequency) for a in synthetic.ATTRIBUTES]
    means = [(low + high) / 2 if p is None else p for low, high, p in ranges]
    variances = [(high - low) ** 2 / 12 if p is None else p * (1 - p) for low, high, p in ranges]
    return np.array(means), np.sqrt(variances)


def standardize(values: Float[np.ndarray, "n a"]) -> Float32[np.ndarray, "n a"]:
    """True attributes of drawn faces in standard deviations from the mean."""
    mean, deviation = spread()
    return ((values - mean) / deviation).astype(np.float32)


def train_regressor(*, resolution: int) -> Regressor:
    """Trains a convolutional network from faces to their standardized attributes, by least squares and Adam."""
    filters = tuple(min(32 * 2**stage, 128) for stage in range(resolution.bit_length() - 3))
    network = encoder(len(synthetic.ATTRIBUTES), filters)
    indices = FIRST_FACE + np.arange(FACES)
    images, drawn = synthetic.faces(indices, resolution=resolution), synthetic.attributes(indices)
    targets = standardize(np.stack([drawn[attribute.name] for attribute in synthetic.ATTRIBUTES], axis=1))
    params: Any = network.init(jax.random.key(0), jnp.zeros((1, resolution, resolution, 3)), None, train=False)
    draw = np.random.default_rng(0)
    rows = (draw.integers(0, FACES, BATCH_SIZE) for _ in range(STEPS))

    def loss(params: Any, key: Array, images: Array, targets: Array) -> Array:
        output: Any = network.apply(params, soften(to_unit(images), key), None, train=True)
        return jnp.mean(jnp.square(output.mean - targets))

    params, _ = fit(params, loss, ((images[batch], targets[batch]) for batch in rows), steps=STEPS)
    read = jax.jit(lambda images: network.apply(params, images, None, train=False).mean)
    return lambda images: in_batches(read, images)


def soften(images: Float[Array, "b h w c"], key: Array) -> Float[Array, "b h w c"]:
    """Adds noise to all images, and blurs half of them by a Gaussian of up to `MAX_BLUR` pixels."""
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
