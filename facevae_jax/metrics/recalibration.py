"""Recomputes batch normalization's statistics for evaluation ("PreciseBN", Wu & Johnson 2021, section 3).

Running averages lag behind the parameters, and dropout, which is off in evaluation, changes the variances that they
average (Li et al. 2019, "variance shift").
"""

import dataclasses
from typing import Any

import jax
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
    def statistics(variables: Any, number: Array, images: Array) -> Any:
        keys = image_keys(jax.random.fold_in(key, number), size)
        _, updates = model.apply(variables, images, keys, train=True, mutable=["batch_stats"])
        return flatten_dict(updates["batch_stats"])

    parts = [statistics(variables, number, gather_rows(pixels, plan.rows(number)[0])) for number in range(batches)]
    stacked = {path: np.stack([part[path] for part in parts]) for path in parts[0]}
    found = {path: leaf.mean(axis=0) for path, leaf in stacked.items()}
    for path in found:
        if path[-1] == "var":  # over all images, which is more than the mean of the batches' variances
            found[path] += stacked[(*path[:-1], "mean")].var(axis=0)
    return unflatten_dict(found)
