"""The importance-weighted bound on the likelihood of images (Burda et al. 2016), tighter than the ELBO."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from facevae_jax.core import random
from facevae_jax.core.errors import UserError
from facevae_jax.core.progress import progress_bar
from facevae_jax.inference import Inference
from facevae_jax.models.api import Model, to_unit
from facevae_jax.models.likelihoods import GaussianLikelihood
from facevae_jax.objective import log_ratio

SEED = 0  # of the noise: the same at every evaluation, so that models compare
bound_once = functools.lru_cache(maxsize=16)(functools.partial)  # one object for equal arguments: it is compiled once


class Draws(NamedTuple):
    """Images, and the numbers of the draws from their posteriors."""

    images: Shaped[ArrayLike, "b h w c"]
    rows: Int[ArrayLike, " b"]  # of the images in their split; row and draw number decide the noise
    first: Int[ArrayLike, " b"]  # number of the first draw
    variance: Float[ArrayLike, " b"]  # of the decoder's Gaussian, if it is one


def log_weights(
    model: Model, variables: Any, given: Draws, *, count: int, likelihood: GaussianLikelihood
) -> Float[Array, "b k"]:
    """log p(x | z) p(z) / q(z | x) of `count` draws z from each posterior (Burda et al. 2016, eq. 8)."""
    key = random.named_key(SEED, "importance")
    keys = jax.vmap(lambda row, first: random.keys_of(jax.random.fold_in(key, row), first + jnp.arange(count)))
    images, variance = (jnp.repeat(jnp.asarray(x), count, axis=0) for x in (given.images, given.variance))
    output = model.apply(variables, images, keys(given.rows, given.first).reshape(-1), train=False)
    weights = likelihood.log_prob(to_unit(images), output.decoded, variance) + log_ratio(output)
    return weights.reshape(-1, count)


def importance_bounds(
    inference: Inference,
    images: Shaped[np.ndarray, "n h w c"],
    *,
    likelihood: GaussianLikelihood,
    variance: float,
    draws: Sequence[int],
) -> dict[int, Float[np.ndarray, " n"]]:
    """log 1/K sum of K importance weights for each image and each K of `draws`, nats; K = 1 is the ELBO.

    All K use the same draws; a smaller K splits them into groups, whose bounds are averaged. So, by Jensen's
    inequality, the bound of a larger K is never below that of a smaller one, whatever the draws.

    Args:
      inference: with the model.
      images: rows 0 to n - 1 of a split.
      likelihood: of the decoder.
      variance: of the decoder's Gaussian, if it is one.
      draws: values of K, which `check_draws` accepts.
    """
    most, size = draws[-1], min(inference.batch_size, len(images))
    # At most one batch of codes at a time: more pictures would leave the cache before they are compared.
    each = next(count for count in range(inference.batch_size // size, 0, -1) if most % count == 0)
    weigh = bound_once(log_weights, count=each, likelihood=likelihood)
    found: list[Any] = []
    with progress_bar(total=len(images) * most, description="importance", unit="draw") as progress:
        for rows in np.split(np.arange(len(images)), range(size, len(images), size)):
            given, variances = images[rows], np.full(len(rows), variance, np.float32)
            batches = (Draws(given, rows, np.full(len(rows), first), variances) for first in range(0, most, each))
            parts = []
            for weights in inference.map_stream(weigh, batches):
                parts.append(weights)
                progress.update(weights.size)
            found.append(_bounds(np.concatenate(parts, axis=1), draws))
    return {count: np.concatenate([bounds[count] for bounds in found]) for count in draws}


def check_draws(draws: Sequence[int]) -> None:
    """Raises a UserError unless each of `draws` is positive and a multiple of the one before."""
    if not draws or draws[0] < 1 or any(b % a or b <= a for a, b in itertools.pairwise(draws)):
        raise UserError(
            f"--importance_samples={','.join(map(str, draws))} must increase, each a multiple of the previous one, "
            "such as 1,10,100,1000."
        )


def _bounds(weights: Float[np.ndarray, "b k"], draws: Sequence[int]) -> dict[int, Float[np.ndarray, " b"]]:
    """In float64: weights of thousands of pixels differ by many nats."""
    groups = {count: weights.astype(np.float64).reshape(len(weights), -1, count) for count in draws}
    return {count: np.logaddexp.reduce(g, axis=2).mean(axis=1) - math.log(count) for count, g in groups.items()}
