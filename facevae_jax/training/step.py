"""One optimiser step, many of them in one dispatch, and the evaluation of one batch: pure functions of arrays."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from facevae_jax.config import RunConfig
from facevae_jax.data.augmentation import dequantize, random_flip
from facevae_jax.data.batches import Batch, Chunk, batch_reader
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.models.vae import VAE, to_unit
from facevae_jax.objective import MIN_VARIANCE, Loss, fixed_variance, image_terms, kl_weight, negative_elbo
from facevae_jax.random import named_key
from facevae_jax.training.sharding import DATA_AXIS, make_mesh
from facevae_jax.training.state import DecoderVariance, TrainState

ACTIVE_VARIANCE = 0.01  # of the posterior means over the data, above which a unit is active (Burda et al. 2016)
DECODER_VARIANCE_MOMENTUM = 0.99  # of the running mean over training batches


class Metrics(NamedTuple):
    """What one step reports."""

    loss: Loss
    gradient_norm: Float[Array, ""]
    skipped: Float[Array, ""]  # 1 where it was not finite, so that nothing was learned; else 0


class Trainer(NamedTuple):
    """What a step needs beside arrays."""

    config: RunConfig
    model: VAE
    optimizer: optax.GradientTransformation

    @property
    def dimensions(self) -> int:
        """Pixel values of one image."""
        return math.prod(self.model.image_shape)


def estimate_variance(mse: Float[Array, ""], params: Any, trainer: Trainer) -> Float[Array, ""]:
    """The decoder's variance for a training batch: fixed by r_loss_factor, learned, or the batch's optimum.

    The last is told of a likelihood that has no variance too.
    """
    objective = trainer.config.objective
    if objective.likelihood == "mse":
        return jnp.asarray(fixed_variance(objective, dimensions=trainer.dimensions))
    if objective.likelihood == "gaussian" and objective.variance == "learned":
        return jnp.maximum(jnp.exp(params["decoder_log_variance"]), MIN_VARIANCE)
    # At the optimum the loss does not change with the variance, so holding it fixed leaves the gradient exact
    # (Rybkin et al. 2021, section 3.3).
    return lax.stop_gradient(jnp.maximum(mse, MIN_VARIANCE))


def make_targets(batch: Batch, *, stream: str, step: Array | int, config: RunConfig) -> Float[Array, "b h w c"]:
    """What the decoder is compared with: the images in [0, 1], dequantized if the config says so."""
    if config.data.dequantize:
        return dequantize(*batch, seed=config.train.seed, stream=stream, step=step)
    return to_unit(batch.images)


class StepInput(NamedTuple):
    """What a step computes gradients for: the parts of a batch, stacked; every device has its slice of each part."""

    images: UInt8[Array, "p b h w c"]
    rows: Int[Array, "p b"]
    noise: Float[Array, "p b z"]  # from N(0, I)


def _gradients(
    state: TrainState, batch: Batch, noise: Float[Array, "b z"], part: Array | int, *, trainer: Trainer
) -> tuple[Any, Loss, Any]:
    """This device's gradients, and the loss and the new batch statistics of all devices, of one part of a batch.

    The gradients' sum over the devices is that of the loss.
    """
    config, axis = trainer.config, trainer.model.execution.axis
    images = random_flip(batch, seed=config.train.seed, step=state.step) if config.data.flip else batch.images
    weight = kl_weight(config.objective, state.step)
    dropout_key = jax.random.fold_in(named_key(config.train.seed, "dropout"), state.step)
    if config.train.accumulation > 1:
        dropout_key = jax.random.fold_in(dropout_key, part)
    targets = make_targets(Batch(images, batch.rows), stream="dequantize", step=state.step, config=config)

    def loss_function(params: Any) -> tuple[Float[Array, ""], tuple[Loss, Any]]:
        output, updates = trainer.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            noise,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        terms = image_terms(targets, output)
        scalars = jnp.stack([jnp.mean(terms.squared_error), jnp.mean(terms.discrete_nll)])
        means = jnp.concatenate([scalars, jnp.mean(terms.kl, axis=0)])
        means = lax.pmean(means, axis) if axis else means
        mse = means[0]
        loss = negative_elbo(
            mse,
            means[2:],
            discrete_nll=means[1],
            variance=estimate_variance(mse, params, trainer),
            kl_weight=weight,
            dimensions=trainer.dimensions,
            config=config.objective,
        )
        # Every device has the whole loss: each answers for its share.
        share = loss.loss / lax.axis_size(axis) if axis else loss.loss
        return share, (loss, updates.get("batch_stats", {}))

    gradients, (loss, batch_stats) = jax.grad(loss_function, has_aux=True)(state.params)
    return gradients, loss, batch_stats


def _mean_gradients(state: TrainState, given: StepInput, *, trainer: Trainer) -> tuple[Any, Loss, Any]:
    """The gradients of a step: the mean over the parts, computed one after another, and the sum over the devices."""
    parts, axis = trainer.config.train.accumulation, trainer.model.execution.axis

    def one(part: Array | int) -> tuple[Any, Loss, Any]:
        images, rows, noise = (array[part] for array in given)
        return _gradients(state, Batch(images, rows), noise, part, trainer=trainer)

    if parts == 1:
        gradients, loss, batch_stats = one(0)
    else:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: one(0)))
        sums = lax.fori_loop(0, parts, lambda part, sums: jax.tree.map(jnp.add, sums, one(part)), zeros)
        gradients, loss, batch_stats = jax.tree.map(lambda total: total / parts, sums)
    if axis:
        # As one array, once a step: what an exchange costs between processes is mostly its beginning.
        flat, unravel = ravel_pytree(gradients)
        gradients = unravel(lax.psum(flat, axis))
    return gradients, loss, batch_stats


def _on_each_device(function: Callable[..., Any], given: Any, *, cut_axis: int) -> Callable[..., Any]:
    """`function` of (replicated tree, `given`), run by every device on its slices of `given` along `cut_axis`.

    What it gives must be the same on all devices; what they exchange is written in it, and nothing else is sent.
    """
    specs = jax.tree.map(lambda _: PartitionSpec(*[None] * cut_axis, DATA_AXIS), given)
    # Without the check a psum's gradient is a psum, on which `_gradients` and the batch normalisation rely.
    return jax.shard_map(
        function, mesh=make_mesh(), in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec(), check_vma=False
    )


def train_step(
    state: TrainState, read: Callable[[Array | int], Batch], *, trainer: Trainer
) -> tuple[TrainState, Metrics]:
    """One step of the optimiser on one global batch; its randomness is a function of (seed, step, row).

    A step whose loss or gradient is not finite changes nothing but the step's number.

    Args:
      state: before the step; where many steps go in one dispatch it is donated.
      read: from the number of a part of the batch to that part, of `config.train.accumulation` parts.
      trainer: what is needed beside arrays.
    """
    config = trainer.config.train
    parts = [read(part) for part in range(config.accumulation)]
    key = jax.random.fold_in(named_key(config.seed, "latent"), state.step)
    noise = jax.random.normal(
        key, (config.accumulation, config.batch_size // config.accumulation, trainer.config.model.latent_dim)
    )
    given = StepInput(jnp.stack([part.images for part in parts]), jnp.stack([part.rows for part in parts]), noise)
    compute: Callable[..., Any] = functools.partial(_mean_gradients, trainer=trainer)
    if trainer.model.execution.axis:
        compute = _on_each_device(compute, given, cut_axis=1)
    gradients, loss, batch_stats = compute(state, given)
    norm = optax.tree.norm(gradients)
    updates, opt_state = trainer.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    averaged = state.averaged
    if averaged is not None:
        # A short average to begin with, or the random initialisation would stay in it for thousands of steps.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        averaged = optax.incremental_update({"params": params, "batch_stats": batch_stats}, averaged, 1.0 - decay)
    running, momentum = state.decoder_variance, DECODER_VARIANCE_MOMENTUM
    advanced = state.replace(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        averaged=averaged,
        decoder_variance=DecoderVariance(
            total=momentum * running.total + (1 - momentum) * loss.variance,
            weight=momentum * running.weight + (1 - momentum),
        ),
    )
    finite = jnp.isfinite(loss.loss) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), advanced, state)
    return state.replace(step=state.step + 1), Metrics(loss, norm, jnp.where(finite, 0.0, 1.0))


def train_steps(
    state: TrainState, chunk: Chunk, count: Int[Array, ""], *, trainer: Trainer, capacity: int
) -> tuple[TrainState, Metrics]:
    """The first `count` steps' batches of `chunk`, in one dispatch.

    `count` is a traced number, so one compiled program serves every length up to `capacity`. Returns the metrics as
    arrays [capacity], of which the first `count` are filled.
    """
    parts = trainer.config.train.accumulation
    batch = batch_reader(chunk)

    def one(state: TrainState, index: Array | int) -> tuple[TrainState, Metrics]:
        return train_step(state, lambda part: batch(index * parts + part), trainer=trainer)

    shapes = jax.eval_shape(one, state, 0)[1]
    history = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

    def body(index: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, history = carry
        state, metrics = one(state, index)
        return state, jax.tree.map(lambda all_steps, value: all_steps.at[index].set(value), history, metrics)

    return lax.fori_loop(0, count, body, (state, history))


class EvaluationSums(flax.struct.PyTreeNode):
    """Sums over images, from which the split's exact figures are made."""

    images: Float[Array, ""]
    squared_error: Float[Array, ""]
    discrete_nll: Float[Array, ""]
    kl: Float[Array, " z"]
    latent: Float[Array, " z"]  # of the posterior means
    posterior_variance: Float[Array, " z"]
    latent_square: Float[Array, "z z"]  # of E[z z^T] under the posteriors

    @classmethod
    def zeros(cls, latent_dim: int) -> "EvaluationSums":
        """The empty sums."""
        scalar, vector = jnp.zeros(()), jnp.zeros(latent_dim)
        return cls(scalar, scalar, scalar, vector, vector, vector, jnp.zeros((latent_dim, latent_dim)))


def _evaluation_sums(
    variables: Any, given: tuple[Batch, Float[Array, "b z"], Bool[Array, " b"]], *, trainer: Trainer
) -> EvaluationSums:
    """What the valid images of a batch add; of several devices each has a slice of it."""
    batch, noise, valid = given
    # The same noise at every evaluation, so that evaluations compare.
    targets = make_targets(batch, stream="dequantize evaluation", step=0, config=trainer.config)
    output: Any = trainer.model.apply(variables, batch.images, noise, train=False)
    terms = image_terms(targets, output)
    mask = valid.astype(jnp.float32)
    mean, log_variance = output.posterior
    weighted = mean * mask[:, None]
    variance = jnp.sum(jnp.exp(log_variance) * mask[:, None], axis=0)
    sums = EvaluationSums(
        images=jnp.sum(mask),
        # where, not a product: padding may hold anything, and 0 x NaN is NaN.
        squared_error=jnp.sum(jnp.where(valid, terms.squared_error, 0.0)),
        discrete_nll=jnp.sum(jnp.where(valid, terms.discrete_nll, 0.0)),
        kl=jnp.sum(jnp.where(valid[:, None], terms.kl, 0.0), axis=0),
        latent=jnp.sum(weighted, axis=0),
        posterior_variance=variance,
        # In full float32: the accelerators' default precision would be lost where the mean's square is subtracted.
        latent_square=jnp.matmul(weighted.T, mean, precision=lax.Precision.HIGHEST) + jnp.diag(variance),
    )
    axis = trainer.model.execution.axis
    return lax.psum(sums, axis) if axis else sums


def evaluation_step(
    sums: EvaluationSums,
    variables: Any,
    batch: Batch,
    valid: Bool[Array, " b"],
    number: Int[Array, ""],
    *,
    trainer: Trainer,
) -> EvaluationSums:
    """Adds batch `number` of a split; rows where `valid` is false are padding and add nothing."""
    key = jax.random.fold_in(named_key(trainer.config.train.seed, "evaluate"), number)
    given = batch, jax.random.normal(key, (len(batch.rows), trainer.config.model.latent_dim)), valid
    compute: Callable[..., Any] = functools.partial(_evaluation_sums, trainer=trainer)
    if trainer.model.execution.axis:
        compute = _on_each_device(compute, given, cut_axis=0)
    return jax.tree.map(jnp.add, sums, compute(variables, given))


def finish_evaluation(
    sums: EvaluationSums, decoder_variance: Float[Array, ""], *, trainer: Trainer
) -> tuple[Loss, LatentMoments, Float[Array, ""]]:
    """The split's loss, at the full KL weight so that epochs of a warm-up compare, and its latents' moments.

    The third is the number of active units.
    """
    loss = negative_elbo(
        sums.squared_error / sums.images,
        sums.kl / sums.images,
        discrete_nll=sums.discrete_nll / sums.images,
        variance=decoder_variance,
        kl_weight=trainer.config.objective.kl_weight,
        dimensions=trainer.dimensions,
        config=trainer.config.objective,
    )
    mean = sums.latent / sums.images
    covariance = sums.latent_square / sums.images - jnp.outer(mean, mean)
    of_means = jnp.diag(covariance) - sums.posterior_variance / sums.images
    active = jnp.sum(of_means > ACTIVE_VARIANCE).astype(jnp.float32)
    return loss, LatentMoments(sums.images, mean, covariance), active


def evaluation_variance(running: DecoderVariance, params: Any, *, trainer: Trainer) -> Float[Array, ""]:
    """The decoder's variance for evaluation: what training arrived at, never fitted to the split itself.

    Args:
      running: the mean over training batches, which the analytic optimum uses.
      params: those that are evaluated, which hold a learned variance.
      trainer: config and model.
    """
    objective = trainer.config.objective
    if objective.is_discrete or (objective.likelihood == "gaussian" and objective.variance == "optimal"):
        return jnp.where(running.weight > 0, running.total / jnp.maximum(running.weight, 1e-30), 1.0)
    return estimate_variance(jnp.zeros(()), params, trainer)


def compile_train_steps(trainer: Trainer, state: TrainState, chunk: Chunk, *, capacity: int) -> jax.stages.Compiled:
    """Ahead-of-time compilation of `train_steps` for arrays like these; the state is donated."""
    function = jax.jit(functools.partial(train_steps, trainer=trainer, capacity=capacity), donate_argnums=0)
    return function.lower(state, chunk, jax.ShapeDtypeStruct((), jnp.int32)).compile()
