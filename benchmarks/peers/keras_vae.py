"""The paper's model in Keras 3, trained by Keras' own `fit` on the backend that KERAS_BACKEND names.

The pixels are a uint8 array in memory and are scaled in the network, which is fastest in Keras; all other options of
`fit` and `compile` are the defaults.
"""

import math
import time
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.peers import case
from facevae_jax.config import RunConfig
from facevae_jax.core.settings import CHANNELS

CONVOLUTION = {"kernel_size": 3, "strides": 2, "padding": "same"}


class VAE(keras.Model):
    """Pixels 0 to 255 to (reconstruction, mean, log variance)."""

    def __init__(self, config: RunConfig) -> None:
        """Makes the layers for one resolution."""
        super().__init__()
        resolution, latent_dim = config.data.resolution, config.model.latent_dim
        side = resolution // 2 ** len(case.FILTERS)
        self.r_loss_factor = config.objective.r_loss_factor
        self.seed_generator = keras.random.SeedGenerator(0)
        x = pixels = keras.Input((resolution, resolution, CHANNELS))
        x = layers.Rescaling(1.0 / 255.0)(x)
        for filters in case.FILTERS:
            x = hidden(layers.Conv2D(filters, **CONVOLUTION)(x))
        x = layers.Flatten()(x)
        self.encoder = keras.Model(pixels, [layers.Dense(latent_dim)(x) for _ in ("mean", "log variance")])
        x = latents = keras.Input((latent_dim,))
        x = layers.Reshape((side, side, case.FILTERS[-1]))(layers.Dense(side * side * case.FILTERS[-1])(x))
        for filters in case.FILTERS[-2::-1]:
            x = hidden(layers.Conv2DTranspose(filters, **CONVOLUTION)(x))
        x = layers.Conv2DTranspose(CHANNELS, **CONVOLUTION, activation="sigmoid")(x)
        self.decoder = keras.Model(latents, x)

    def call(self, pixels: Any) -> tuple[Any, Any, Any]:
        """Reconstructs from one draw of the posterior."""
        mean, log_variance = self.encoder(pixels)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator, dtype=mean.dtype)
        return self.decoder(mean + ops.exp(0.5 * log_variance) * noise), mean, log_variance

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any) -> Any:
        """r_loss_factor x MSE + KL, averaged over the batch."""
        reconstruction, mean, log_variance = y_pred
        error = ops.mean(ops.square(ops.cast(x, "float32") / 255.0 - reconstruction))
        kl = -0.5 * ops.sum(1.0 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=1)
        return self.r_loss_factor * error + ops.mean(kl)


def hidden(x: Any) -> Any:
    """The layers after a hidden convolution."""
    x = layers.BatchNormalization(momentum=case.BATCH_NORM_MOMENTUM, epsilon=case.BATCH_NORM_EPSILON)(x)
    return layers.LeakyReLU(negative_slope=case.LEAKY_RELU_SLOPE)(x)


def make_case(config: RunConfig, variant: str) -> case.Case:
    """Keras' `fit` on the backend `variant`, which must be the value of KERAS_BACKEND."""
    if keras.backend.backend() != variant:
        raise RuntimeError(f"Keras has the backend {keras.backend.backend()}, not {variant}")
    keras.utils.set_random_seed(0)
    pixels = case.fixed_batch(config)
    model = VAE(config)
    model.compile(optimizer=keras.optimizers.Adam(config.train.learning_rate, epsilon=case.ADAM_EPSILON))

    def train(epochs: int, epoch_steps: int) -> float:
        images = np.tile(pixels, (epoch_steps, 1, 1, 1))
        begun: list[float] = []  # of each epoch: the work of `fit` before the first one is not training
        clock = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(time.perf_counter()))
        history = model.fit(images, batch_size=len(pixels), epochs=epochs, verbose=0, callbacks=[clock])
        seconds = time.perf_counter() - begun[0]
        if not math.isfinite(history.history["loss"][-1]):
            raise FloatingPointError(f"the loss became {history.history['loss'][-1]}")
        return seconds

    parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    return case.Case(case.by_epochs(train), parameters, str(ops.zeros(1).device), {"keras": keras.__version__})
