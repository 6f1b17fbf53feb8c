"""Recomputes batch normalization's statistics for evaluation ("PreciseBN", Wu & Johnson 2021, section 3).

Running averages lag behind the parameters, and dropout, which is off in evaluation, changes the variances that they
average (Li et al. 2019, "variance shift").
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.core.random import named_key
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.feed import gather_rows
from facevae_jax.data.plan import BatchPlan
from facevae_jax.models.api import image_keys
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import make_model

IMAGES = 10_000  # of the training split, at most


def recalibrated(restored: Restored) -> Restored:
    """The model with the statistics of training batches without dropout.

    Raises:
      UserError: it has no batch normalization, or the data cannot be read.
    """
    if not restored.variables.get("batch_stats") or not hasattr(restored.config.model, "batch_norm_momentum"):
        raise UserError("--recalibrate: this model has no batch normalization: leave the flag out.")
    pixels = open_dataset(restored.config.data).images("train")
    variables = {**restored.variables, "batch_stats": batch_statistics(restored, pixels)}
    return restored._replace(variables=variables, moments=None)


def batch_statistics(restored: Restored, pixels: UInt8[np.ndarray, "n h w c"]) -> Any:
    """Mean and variance of every normalized channel over training batches, each normalized by its own moments."""
    config = restored.config
    # Momentum 0: each batch's statistics alone.
    quiet = dataclasses.replace(config.model, dropout_rate=0.0, batch_norm_momentum=0.0)  # type: ignore[type-var]
    model, _ = make_model(dataclasses.replace(config, model=quiet))
    variables = jax.device_get(restored.variables)
    size = min(config.train.batch_size, len(pixels))
    batches = max(1, min(IMAGES, len(pixels)) // size)
    plan = BatchPlan(config.train.seed, len(pixels), size)
    key = named_key(config.train.seed, "recalibrate")

    @jax.jit
    def moments(variables: Any, number: Array, images: Array) -> Any:
        keys = image_keys(jax.random.fold_in(key, number), size)
        _, updates = model.apply(variables, images, keys, train=True, mutable=["batch_stats"])
        statistics = flatten_dict(updates["batch_stats"])
        # Means and means of squares: the variance over all images is more than the mean of the batches' variances.
        squares = {path: leaf + jnp.square(statistics[(*path[:-1], "mean")]) for path, leaf in statistics.items()}
        return {path: squares[path] if path[-1] == "var" else leaf for path, leaf in statistics.items()}

    sums: Any = None
    for number in range(batches):
        part = moments(variables, number, gather_rows(pixels, plan.rows(number)[0]))
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    means = {path: total / batches for path, total in sums.items()}
    found = {
        path: leaf - jnp.square(means[(*path[:-1], "mean")]) if path[-1] == "var" else leaf
        for path, leaf in means.items()
    }
    return unflatten_dict(found)
