"""The paper's model in Keras 3, trained by Keras' own `fit` on the backend that KERAS_BACKEND names.

The pixels are a uint8 array in memory and scaled in the network, which costs Keras least; all that `fit` and `compile`
leave open stays at its default.
"""

import math
import time
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.peers.case import (
    ADAM_EPSILON,
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    FILTERS,
    LEAKY_RELU_SLOPE,
    Case,
    Timing,
    fixed_batch,
    whole_epochs,
)
from facevae_jax.config import CHANNELS, RunConfig


class Sampling(layers.Layer):
    """One draw of the posterior."""

    def __init__(self, **options: Any) -> None:
        """Makes the layer's own stream of random numbers."""
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, mean: Any, log_variance: Any) -> Any:
        """mean + exp(log_variance / 2) * eps."""
        epsilon = keras.random.normal(ops.shape(mean), seed=self.seed_generator, dtype=mean.dtype)
        return mean + ops.exp(0.5 * log_variance) * epsilon


class VAE(keras.Model):
    """Pixels 0 to 255 to (reconstruction, mean, log variance)."""

    def __init__(self, config: RunConfig) -> None:
        """Makes the layers for one resolution."""
        super().__init__()
        self.r_loss_factor = config.objective.r_loss_factor
        self.scale = layers.Rescaling(1.0 / 255.0)
        self.encoder = make_encoder(config.data.resolution, config.model.latent_dim)
        self.sampling = Sampling(dtype="float32")
        self.decoder = make_decoder(config.data.resolution, config.model.latent_dim)

    def call(self, pixels: Any) -> tuple[Any, Any, Any]:
        """Reconstructs from one draw of the posterior."""
        mean, log_variance = self.encoder(self.scale(pixels))
        return self.decoder(self.sampling(mean, log_variance)), mean, log_variance

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """r_loss_factor x MSE + KL, averaged over the batch."""
        del y, sample_weight, training
        reconstruction, mean, log_variance = y_pred
        error = ops.mean(ops.square(ops.cast(x, "float32") / 255.0 - reconstruction))
        kl = -0.5 * ops.sum(1.0 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=1)
        return self.r_loss_factor * error + ops.mean(kl)


def hidden(x: Any) -> Any:
    """What follows a hidden convolution."""
    x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON)(x)
    return layers.LeakyReLU(negative_slope=LEAKY_RELU_SLOPE)(x)


def make_encoder(resolution: int, latent_dim: int) -> keras.Model:
    """Images in [0, 1] to (mean, log variance)."""
    x = images = keras.Input((resolution, resolution, CHANNELS))
    for filters in FILTERS:
        x = hidden(layers.Conv2D(filters, 3, strides=2, padding="same")(x))
    x = layers.Flatten()(x)
    heads = [layers.Dense(latent_dim, name=name)(x) for name in ("mean", "log_variance")]
    return keras.Model(images, [layers.Activation("linear", dtype="float32")(head) for head in heads])


def make_decoder(resolution: int, latent_dim: int) -> keras.Model:
    """Latents to images in [0, 1]."""
    side = resolution // 2 ** len(FILTERS)
    latents = keras.Input((latent_dim,))
    x = layers.Dense(side * side * FILTERS[-1])(latents)
    x = layers.Reshape((side, side, FILTERS[-1]))(x)
    for filters in FILTERS[-2::-1]:
        x = hidden(layers.Conv2DTranspose(filters, 3, strides=2, padding="same")(x))
    x = layers.Conv2DTranspose(CHANNELS, 3, strides=2, padding="same")(x)
    return keras.Model(latents, layers.Activation("sigmoid", dtype="float32")(x))


def trainable_parameters(model: keras.Model) -> int:
    """Numbers that the optimiser changes."""
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


class Clock(keras.callbacks.Callback):
    """Starts with the first epoch: what `fit` does before it is no training."""

    started = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Called by Keras."""
        if epoch == 0:
            self.started = time.perf_counter()


def device_name() -> str:
    """The device that the backend trains on."""
    if keras.backend.backend() == "torch":
        from benchmarks.peers import torch_vae

        return torch_vae.device_name()
    import jax

    return jax.devices()[0].device_kind


def make_case(config: RunConfig, variant: str) -> Case:
    """Keras' `fit` on the backend `variant`, which the worker has put into KERAS_BACKEND."""
    if keras.backend.backend() != variant:
        raise RuntimeError(f"Keras has the backend {keras.backend.backend()}, not {variant}")
    if config.model.dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    pixels = fixed_batch(config)
    model = VAE(config)
    model.compile(optimizer=keras.optimizers.Adam(config.train.learning_rate, epsilon=ADAM_EPSILON))

    def train(steps: int) -> Timing:
        epochs, epoch_steps = whole_epochs(steps)
        images = np.tile(pixels, (epoch_steps, 1, 1, 1))
        clock = Clock()
        history = model.fit(images, batch_size=len(pixels), epochs=epochs, verbose=0, callbacks=[clock])
        seconds = time.perf_counter() - clock.started
        if not math.isfinite(history.history["loss"][-1]):
            raise FloatingPointError(f"the loss became {history.history['loss'][-1]}")
        return Timing(epochs * len(images), seconds)

    return Case(train, trainable_parameters(model), device_name(), {"keras": keras.__version__})
