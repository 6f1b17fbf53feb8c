"""One optimizer step, and many of them in one dispatch: pure functions of arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from facevae_jax.data.batches import Batch, Chunk, batch_reader, dequantize, random_flip, row_keys
from facevae_jax.data.feed import FeedSpec
from facevae_jax.data.plan import PADDING
from facevae_jax.models.api import all_reduce_for_loss, to_unit
from facevae_jax.objective import Loss, image_terms, kl_weight, loss_of
from facevae_jax.training.packing import Joined, Packing
from facevae_jax.training.setup import (
    DATA_AXIS,
    TrainSetup,
    TrainState,
    on_each_device,
    replicated,
)

# Twice as much of a core's 128 MiB for one fusion, which can then hold more of an image: 2 to 5% fewer cycles.
LARGE_FUSIONS: dict[str, str | bool] = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
COMPILER_OPTIONS = {"TPU v5 lite": LARGE_FUSIONS, "TPU v6 lite": LARGE_FUSIONS}
MOMENTUM = 0.99  # of running means over training batches


class Metrics(NamedTuple):
    """What one step reports."""

    loss: Loss
    gradient_norm: Float[Array, ""]
    skipped: Float[Array, ""]  # 1 where it was not finite, so that nothing was learned; else 0
    too_large: Float[Array, ""]  # 1 where nothing was learned because the gradient was far above its running norm


class Gradients(NamedTuple):
    """Of the loss of all devices, with its parts and the new batch statistics."""

    gradients: Any
    norm: Float[Array, ""]
    loss: Loss
    batch_stats: Any


def image_weights(rows: Int[Array, " b"], *, images: int) -> Float[Array, " b"] | None:
    """The weights of this device's images in means over a batch of `images`: 1 on average over the devices.

    None where the batch has no padding, so that all weigh 1.
    """
    padded = len(rows) * lax.axis_size(DATA_AXIS)
    return None if padded == images else jnp.where(rows == PADDING, 0.0, padded / images)


def weighted_mean(values: Float[Array, "b ..."], weights: Float[Array, " b"] | None) -> Float[Array, "..."]:
    """Over the images."""
    if weights is not None:
        values = values * weights.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.mean(values, axis=0)


def _gradients(state: TrainState, batch: Batch, *, setup: TrainSetup) -> tuple[Any, Loss, Any]:
    """This device's gradients, and the loss and the new batch statistics of all devices, of one part of a batch.

    The gradients' sum over the devices is that of the loss.
    """
    config, seed, step = setup.config, setup.config.train.seed, state.step
    streams = ("latent", "flip", "dequantize") if config.data.dequantize else ("latent", "flip")
    keys, flips, *noise = row_keys(batch.rows, *streams, seed=seed, step=step)
    images = batch.images.reshape(-1, *setup.model.image_shape)
    if config.data.flip:
        images = random_flip(images, flips)
    targets = dequantize(images, *noise) if noise else to_unit(images)
    weights = image_weights(batch.rows, images=config.train.batch_size // config.train.accumulation)
    counted = {} if weights is None else {"weights": weights}

    def loss_function(params: Any) -> tuple[Float[Array, ""], tuple[Loss, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        output, updates = setup.model.apply(variables, images, keys, train=True, mutable=["batch_stats"], **counted)
        terms = image_terms(targets, output, setup.likelihood)
        devices = lax.axis_size(DATA_AXIS)
        parts = jax.tree.map(lambda term: weighted_mean(term, weights) / devices, terms)
        means = all_reduce_for_loss(parts, DATA_AXIS)
        variance = setup.likelihood.batch_variance(means.pixels.squared_error, params)
        loss = loss_of(
            means,
            variance=variance,
            kl_weight=kl_weight(config.objective, step),
            likelihood=setup.likelihood,
            config=config.objective,
        )
        # Each device computes the global loss, so its gradient is divided by the number of devices.
        return loss.loss / devices, (loss, updates.get("batch_stats", {}))

    gradients, (loss, batch_stats) = jax.grad(loss_function, has_aux=True)(state.params)
    return gradients, loss, batch_stats


def _mean_gradients(state: TrainState, parts: Batch, *, setup: TrainSetup, packing: Packing | None) -> Gradients:
    """The gradients of a step: the mean over the parts, computed one after another, and the sum over the devices.

    Args:
      state: before the step.
      parts: the batch with a leading axis over its parts; this device has a slice of each.
      setup: what is needed beside arrays.
      packing: of the state, and of the gradients and batch statistics that are returned.
    """
    count = setup.config.train.accumulation
    if packing:
        params, batch_stats = packing.params.unpack(state.params), packing.batch_stats.unpack(state.batch_stats)
        state = state._replace(params=params, batch_stats=batch_stats)

    def one(part: Array | int) -> tuple[Any, Loss, Any]:
        return _gradients(state, Batch(*(array[part] for array in parts)), setup=setup)

    if count == 1:
        gradients, loss, batch_stats = one(0)
    else:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: one(0)))
        sums = lax.fori_loop(0, count, lambda part, sums: jax.tree.map(jnp.add, sums, one(part)), zeros)
        gradients, loss, batch_stats = jax.tree.map(lambda total: total / count, sums)
    if packing:
        gradients, batch_stats = packing.params.pack(gradients), packing.batch_stats.pack(batch_stats)
    gradients = setup.execution.sum(gradients)
    return Gradients(gradients, optax.tree.norm(gradients), loss, batch_stats)


def train_step(
    state: TrainState, batch: Batch, *, setup: TrainSetup, packing: Packing | None = None
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer on one global batch; its randomness is a function of (seed, step, row).

    A step whose loss or gradient is not finite changes nothing but the step's number. One whose gradient is more than
    `skip_factor` times as large as usual changes that and the running mean of the gradient's norm.

    Args:
      state: before the step.
      batch: images [b, h, w, c] or [b, l, lanes], uint8, and the rows [b] of their split, which decide what is drawn.
      setup: config, model, likelihood, optimizer and mesh.
      packing: how the state is packed; None: it is not.
    """
    config = setup.config.train
    # Every n-th image goes into a part, so that each device finds its share of each part in its slice of the batch.
    parts = jax.tree.map(lambda x: x.reshape(-1, config.accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    compute = on_each_device(functools.partial(_mean_gradients, setup=setup, packing=packing), setup.mesh, axis=1)
    gradients, norm, loss, batch_stats = compute(state, parts)
    updates, opt_state = setup.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    averaged = state.averaged
    if averaged is not None:
        # A short average to begin with, or the random initialization would stay in it for thousands of steps.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        averaged = optax.incremental_update({"params": params, "batch_stats": batch_stats}, averaged, 1.0 - decay)
    variance = state.decoder_variance.add(loss.variance, momentum=MOMENTUM)
    finite, norms, limit = jnp.isfinite(loss.loss) & jnp.isfinite(norm), state.gradient_norm, jnp.array(jnp.inf)
    if norms is not None:
        limit = jnp.where(norms.total > 0, config.skip_factor * norms.mean, jnp.inf)
        # A norm that stays large raises its own limit by a few percent a step, so no run skips forever.
        norms = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), norms.add(jnp.minimum(norm, limit), momentum=MOMENTUM), norms
        )
    learns = finite & (norm <= limit)
    advanced = TrainState(state.step, params, batch_stats, opt_state, averaged, variance, state.gradient_norm)
    state = jax.tree.map(lambda new, old: jnp.where(learns, new, old), advanced, state)
    metrics = Metrics(loss, norm, jnp.where(finite, 0.0, 1.0), jnp.where(finite & ~learns, 1.0, 0.0))
    return state._replace(step=state.step + 1, gradient_norm=norms), metrics


def train_steps(
    state: TrainState, chunk: Chunk, count: Int[Array, ""], *, setup: TrainSetup, capacity: int
) -> tuple[TrainState, Metrics]:
    """The first `count` batches of `chunk`, in one dispatch.

    `count` is a traced number, so one compiled program serves every length up to `capacity`. The metrics are arrays
    [capacity]; their first `count` values are filled.
    """
    read = batch_reader(chunk, mesh=setup.mesh)
    # A TPU lays a vector out anew for each product, and a CPU has no launches.
    packing = Packing.of(state) if setup.execution.few_launches else None

    def one(state: TrainState, index: Array | int) -> tuple[TrainState, Metrics]:
        return train_step(state, read(index), setup=setup, packing=packing)

    start = packing.pack(state) if packing else state
    shapes = jax.eval_shape(one, start, 0)[1]
    empty, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def join(state: TrainState) -> TrainState | Joined:
        return Joined.of(state) if packing else state

    def part(carried: TrainState | Joined) -> TrainState:
        return carried.part(start) if isinstance(carried, Joined) else carried

    def body(carry: tuple[TrainState | Joined, Array]) -> tuple[TrainState | Joined, Array]:
        before, history = part(carry[0]), carry[1]
        index = before.step - state.step  # and not a counter of the loop, which would be another launch
        after, metrics = one(before, index)
        return join(after), lax.dynamic_update_index_in_dim(history, ravel_pytree(metrics)[0], index, 0)

    end, history = state.step + count, jnp.zeros((capacity, empty.size))
    carried, history = lax.while_loop(lambda carry: part(carry[0]).step < end, body, (join(start), history))
    after = part(carried)
    return packing.unpack(after, like=state) if packing else after, jax.vmap(unravel)(history)


def compile_train_steps(setup: TrainSetup, state: TrainState, feed: FeedSpec) -> jax.stages.Compiled:
    """Ahead-of-time compilation of `train_steps` for a state like this and a feed; the state is donated."""
    function = jax.jit(functools.partial(train_steps, setup=setup, capacity=feed.capacity), donate_argnums=0)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(setup.mesh))
    kind = setup.mesh.devices.flat[0].device_kind if isinstance(setup.mesh, Mesh) else ""
    return function.lower(state, feed.abstract_chunk(), count).compile(COMPILER_OPTIONS.get(kind))
