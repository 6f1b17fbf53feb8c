"""What one training step costs per image, from the config's layers: floating-point operations and bytes moved.

Counted by hand, because XLA's cost analysis counts the body of a loop once, however often it runs.
"""

from typing import NamedTuple

import jax.numpy as jnp

from facevae_jax.config import CHANNELS, RunConfig
from facevae_jax.models.convolution import STRIDE
from facevae_jax.models.vae import forward_flops

# Forward, the gradient by the input and the gradient by the weights are as many multiply-adds each.
PASSES = 3
# An activation is written and read in the forward pass and read again in the backward pass, where its gradient is
# written and read.
ACTIVATION_PASSES = 5
# The uint8 pixels are read as the input, in the loss, and for the gradient of the first kernel.
PIXEL_PASSES = 3
# Each weight is read in both passes and read and written by Adam; its gradient is written and read; its two moments are
# read and written.
WEIGHT_PASSES = 10
WEIGHT_BYTES = 4  # float32, whatever the computation's dtype


class Layer(NamedTuple):
    """One convolution or dense layer, for one image."""

    outputs: int  # values
    weights: int  # without biases, which do not matter


def layers(config: RunConfig) -> list[Layer]:
    """The layers of the encoder and the decoder, in order."""
    resolution, latent = config.data.resolution, config.model.latent_dim
    filters, area = config.model.stage_filters(resolution), config.model.kernel_size**2
    found, channels, side = [], CHANNELS, resolution
    for features in filters:
        side //= STRIDE
        weights = area * channels * features
        found.append(Layer(features * side**2, weights))
        channels = features
    flat = channels * side**2
    found += [Layer(latent, flat * latent)] * 2  # mean and log variance
    found.append(Layer(flat, latent * flat))
    for features in (*reversed(filters[:-1]), CHANNELS):
        weights = area * channels * features
        found.append(Layer(features * (STRIDE * side) ** 2, weights))
        channels, side = features, STRIDE * side
    return found


def training_flops_per_image(config: RunConfig) -> int:
    """Floating-point operations of one image in a training step: 3 x the forward pass."""
    return PASSES * forward_flops(config.model, config.data.resolution)


def training_bytes_per_image(config: RunConfig) -> float:
    """The least bytes that a training step moves per image if nothing stays in a cache between layers.

    5 x (values that the layers give) x (bytes of the computation's dtype) + 3 x (pixel values)
    + 10 x (weights) x 4 / (batch size): see `ACTIVATION_PASSES`, `PIXEL_PASSES` and `WEIGHT_PASSES`. That elementwise
    work (normalisation, activation, dropout) fuses into the layers is assumed; that the gradient of batch
    normalisation needs its sums over the batch first, and so another pass, is left out.
    """
    each = layers(config)
    activations = ACTIVATION_PASSES * sum(layer.outputs for layer in each) * jnp.dtype(config.model.dtype).itemsize
    pixels = PIXEL_PASSES * CHANNELS * config.data.resolution**2
    weights = WEIGHT_PASSES * sum(layer.weights for layer in each) * WEIGHT_BYTES
    return activations + pixels + weights / config.train.batch_size
