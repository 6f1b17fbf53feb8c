"""What training changes: arrays only, so that it is saved, sharded and donated as one tree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from facevae_jax.config import RunConfig, TrainConfig
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.models.convolution import choose_form
from facevae_jax.models.pca import PCA
from facevae_jax.models.vae import VAE, Execution
from facevae_jax.random import named_key
from facevae_jax.training.sharding import DATA_AXIS, replicated

# Learned from here; a trained model's is around 0.01, which Adam would not reach from 1 in a short run.
INITIAL_DECODER_VARIANCE = 0.05
ADAM_EPSILON = 1e-7  # Keras' value; Optax's is 1e-8


class DecoderVariance(flax.struct.PyTreeNode):
    """The variance of the Gaussian likelihood, as it is estimated in training and used in evaluation.

    With the analytic optimum (Rybkin et al. 2021) each batch has its own best variance, its mean squared error;
    `total` / `weight` is their running mean, without the bias of a start at zero.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds."""

    step: Int[Array, ""]  # optimiser steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    averaged: Any  # exponential moving averages of {"params", "batch_stats"}; None without ema_decay
    decoder_variance: DecoderVariance
    latent_moments: LatentMoments

    @property
    def evaluation_variables(self) -> dict[str, Any]:
        """The variables to evaluate and sample with: the averaged ones where they are kept."""
        return {"params": self.params, "batch_stats": self.batch_stats} if self.averaged is None else self.averaged


def make_model(config: RunConfig) -> VAE:
    """The model of a run, with convolutions in the form for this platform."""
    axis = DATA_AXIS if jax.device_count() > 1 else None
    execution = Execution(choose_form(config.train.convolution), axis)
    if config.model.kind == "pca":
        pca: Any = PCA(config.model, config.data.resolution, execution)
        return pca
    return VAE(config.model, config.data.resolution, execution, config.components)


def make_schedule(config: TrainConfig, *, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or cosine to zero at the last step."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else rate, rate, warmup_steps=warmup, decay_steps=max(total_steps, warmup + 1)
        )
    if warmup:
        return optax.join_schedules(
            [optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], boundaries=[warmup]
        )
    return optax.constant_schedule(rate)


def make_optimizer(config: TrainConfig, *, total_steps: int) -> optax.GradientTransformation:
    """Adam with Keras' epsilon, after clipping of the global norm where it is asked for."""
    # identity, not nothing: the optimiser's state then has one structure, and clipping may change on resuming.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(make_schedule(config, total_steps=total_steps), eps=ADAM_EPSILON))


def _initial_state(config: RunConfig, model: VAE, optimizer: optax.GradientTransformation) -> TrainState:
    latent_dim = config.model.latent_dim
    image = jnp.zeros((1, *model.image_shape))
    key = named_key(config.train.seed, "initialise")
    variables = model.init({"params": key}, image, jnp.zeros((1, latent_dim)), train=False)
    params = dict(variables["params"])
    if config.objective.likelihood == "gaussian" and config.objective.variance == "learned":
        params["decoder_log_variance"] = jnp.log(INITIAL_DECODER_VARIANCE)
    batch_stats = variables.get("batch_stats", {})
    start_of_averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        averaged=start_of_averages if config.train.ema_decay else None,
        decoder_variance=DecoderVariance(jnp.zeros(()), jnp.zeros(())),
        latent_moments=LatentMoments(jnp.zeros(()), jnp.zeros(latent_dim), jnp.eye(latent_dim)),
    )


def abstract_state(config: RunConfig, model: VAE, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array being made."""
    shapes = jax.eval_shape(lambda: _initial_state(config, model, optimizer))
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def create_state(config: RunConfig, model: VAE, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0, made by one compiled call where it will live."""
    make = jax.jit(lambda: _initial_state(config, model, optimizer), out_shardings=replicated(mesh))
    return make()


def parameter_count(state: TrainState) -> int:
    """Numbers in the parameters and the batch statistics, as Keras' `summary` counts them."""
    return sum(leaf.size for leaf in jax.tree.leaves((state.params, state.batch_stats)))
