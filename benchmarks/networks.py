"""Training and applying the small convolutional networks that measure generated faces."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from facevae_jax.models import vae
from facevae_jax.models.api import Execution
from facevae_jax.models.convolution import choose_form

LEARNING_RATE, WARMUP_STEPS = 2e-3, 100
READ_BATCH = 128  # images


def encoder(units: int, filters: tuple[int, ...]) -> vae.Encoder:
    """The VAE's encoder without a variance: images to `units` values, which are the mean of what it gives."""
    config = vae.Config(kind="autoencoder", latent_dim=units, filters=filters, normalization="group")
    return vae.Encoder(config, Execution(choose_form("auto")))


def fit(
    params: Any, loss: Callable[..., Array], batches: Iterable[tuple[Any, ...]], *, steps: int
) -> tuple[Any, float]:
    """Minimizes `loss(params, key, *batch)` by Adam with a cosine schedule.

    Returns the parameters and the loss of the last of `steps` batches.
    """
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP_STEPS, steps))

    @jax.jit
    def step(params: Any, state: Any, key: Array, batch: tuple[Array, ...]) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, key, *batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, value = optimizer.init(params), np.nan
    for number, batch in zip(range(steps), batches, strict=False):
        params, state, value = step(params, state, jax.random.fold_in(jax.random.key(1), number), batch)
    return params, float(value)


def in_batches(read: Callable[[Array], Array], images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n f"]:
    """A compiled function of images, applied to batches of one size."""
    padded = np.pad(images, ((0, -len(images) % READ_BATCH), (0, 0), (0, 0), (0, 0)))
    parts = [np.asarray(read(padded[at : at + READ_BATCH])) for at in range(0, len(padded), READ_BATCH)]
    return np.concatenate(parts)[: len(images)]
