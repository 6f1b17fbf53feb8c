"""The optimizer of a run with its schedule, after clipping where that is asked for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from facevae_jax.config import TrainConfig

ADAM_EPSILON = 1e-7  # Keras' value; Optax's is 1e-8


def make_schedule(config: TrainConfig, *, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or cosine to zero at the last step."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else rate, rate, warmup_steps=warmup, decay_steps=max(total_steps, warmup + 1)
        )
    return optax.linear_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)


def make_optimizer(config: TrainConfig, *, total_steps: int) -> optax.GradientTransformation:
    """Adam with Keras' epsilon, AdamW or Adamax, after clipping of the global norm where it is asked for."""
    # identity, not nothing: the optimizer's state then has one structure, and clipping may change on resuming.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rate = optax.scale_by_learning_rate(make_schedule(config, total_steps=total_steps))
    betas = {"b1": config.beta1, "b2": config.beta2}
    if config.optimizer == "adamax":
        return optax.chain(clip, optax.chain(optax.scale_by_adamax(**betas), rate))
    if config.optimizer == "adamw":
        return optax.chain(
            clip, optax.chain(scale_by_adam(**betas), optax.add_decayed_weights(config.weight_decay), rate)
        )
    return optax.chain(clip, optax.chain(scale_by_adam(**betas), rate))


def scale_by_adam(*, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, and its state, with one division for each parameter.

    Optax divides both moments by their bias corrections (Kingma & Ba 2015, algorithm 1), then one by the other.
    Multiplied by the corrections' inverses, which are two numbers, they save a TPU an eighth of the optimizer.
    """

    def update(gradients: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        assert isinstance(state, optax.ScaleByAdamState)
        count = optax.safe_increment(state.count)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, gradients)
        to_first, to_second = 1 / (1 - jnp.array([b1, b2]) ** count)
        updates = jax.tree.map(lambda m, v: m * to_first / (jnp.sqrt(v * to_second) + ADAM_EPSILON), first, second)
        return updates, optax.ScaleByAdamState(count, first, second)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)
