"""Evaluation as training goes: exact figures of the whole split."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from facevae_jax.data.batches import Batch, dequantize, row_keys
from facevae_jax.data.feed import put, put_rows
from facevae_jax.data.plan import evaluation_rows
from facevae_jax.models.api import LatentGroup, all_reduce, to_unit
from facevae_jax.objective import ImageTerms, Loss, image_terms, loss_of
from facevae_jax.training.setup import DATA_AXIS, TrainSetup, TrainState, on_each_device, split_along

ACTIVE_VARIANCE = 0.01  # of the posterior means over the data, above which a unit is active (Burda et al. 2016)
BATCHES_IN_FLIGHT = 2
ASK_EVERY = 8  # batches between two calls of `keep_going`


class Sums(NamedTuple):
    """Sums over images; they give the split's exact figures."""

    images: Float[Array, ""]
    terms: ImageTerms
    means: tuple[Float[Array, "..."], ...]  # of what `_relative_mean` gives, a group of latents each
    squares: tuple[Float[Array, "..."], ...]


class Evaluation(NamedTuple):
    """Figures of a split."""

    loss: Loss  # at the full KL weight, so that epochs of a warm-up compare
    units: Int[Array, " g"]  # latent dimensions of each group
    sides: Int[Array, " g"]  # resolution of each group; 1 of a flat one
    active_units: Int[Array, " g"]  # those whose posterior means vary over the images, measured by their priors


def _sums(variables: Any, given: tuple[Batch, Bool[Array, " b"]], *, setup: TrainSetup) -> Sums:
    """What the valid images of this device's part of a batch add."""
    batch, valid = given
    seed = setup.config.train.seed
    # The same noise at every evaluation, so that evaluations compare.
    noise, keys = row_keys(batch.rows, "dequantize evaluation", "evaluate", seed=seed, step=0)
    targets = dequantize(batch.images, noise) if setup.config.data.dequantize else to_unit(batch.images)
    output = setup.model.apply(variables, batch.images, keys, train=False)

    def total(term: Array) -> Array:
        # where, not a product: padding may hold anything, and 0 x NaN is NaN.
        return jnp.sum(jnp.where(valid.reshape(-1, *[1] * (term.ndim - 1)), term, 0.0), axis=0)

    means = tuple(_relative_mean(group) for group in output.latents)
    terms = image_terms(targets, output, setup.likelihood)
    rows = Sums(jnp.ones(len(valid)), terms, means, tuple(jnp.square(mean) for mean in means))
    return all_reduce(jax.tree.map(total, rows), DATA_AXIS)


def _relative_mean(group: LatentGroup) -> Float[Array, "b ..."]:
    """The posterior's mean in standard deviations of the prior from its mean: a learned prior may vary by itself."""
    if group.prior is None:
        return group.posterior.mean
    return (group.posterior.mean - group.prior.mean) * jnp.exp(-0.5 * group.prior.log_variance)


def finish_evaluation(sums: Sums, state: TrainState, *, setup: TrainSetup) -> Evaluation:
    """The figures of a split from its sums, with the decoder's variance that training arrived at."""
    _, terms, means, squares = jax.tree.map(lambda total: total / sums.images, sums)
    params = state.evaluation_variables["params"]
    loss = loss_of(
        terms,
        variance=setup.likelihood.evaluation_variance(state.decoder_variance.mean, params),
        kl_weight=setup.config.objective.kl_weight,
        likelihood=setup.likelihood,
        config=setup.config.objective,
    )
    active = [jnp.sum(s - jnp.square(m) > ACTIVE_VARIANCE) for m, s in zip(means, squares, strict=True)]
    units, sides = [mean.size for mean in means], [mean.shape[0] if mean.ndim > 1 else 1 for mean in means]
    return Evaluation(loss, *(jnp.array(numbers, int) for numbers in (units, sides, active)))


class Evaluator:
    """Evaluates one split; compiles once."""

    def __init__(self, setup: TrainSetup, images: np.ndarray) -> None:
        """`images` is the split's pixel store [N, R, R, 3]."""
        self._images, self._sharding = images, split_along(setup.mesh, 0)
        part = setup.config.train.batch_size // setup.config.train.accumulation
        self._batch_size = part + -part % setup.mesh.size
        self._sums = jax.jit(on_each_device(functools.partial(_sums, setup=setup), setup.mesh, axis=0))
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add))
        self._finish = jax.jit(functools.partial(finish_evaluation, setup=setup))

    def __call__(self, state: TrainState, keep_going: Callable[[], bool] = lambda: True) -> Evaluation | None:
        """The figures of the split; every image counts once, whatever the batch size.

        None as soon as `keep_going`, which is asked every few batches, answers no.
        """
        total: Sums | None = None
        in_flight: list[Sums] = []
        batches = evaluation_rows(images=len(self._images), batch_size=self._batch_size)
        for number, (rows, valid) in enumerate(batches):
            if number % ASK_EVERY == 0 and not keep_going():
                return None
            batch = Batch(put_rows(self._images, rows, self._sharding), put(rows, self._sharding))
            part = self._sums(state.evaluation_variables, (batch, put(valid, self._sharding)))
            total = part if total is None else self._add(total, part)
            in_flight.append(total)
            if len(in_flight) > BATCHES_IN_FLIGHT:  # or a large split would queue up in device memory
                jax.block_until_ready(in_flight.pop(0))
        return self._finish(total, state)
