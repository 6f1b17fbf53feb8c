"""Batch normalisation's statistics computed anew for evaluation ("precise" ones, Wu & Johnson 2021, section 3).

A run's running averages lag behind the parameters, and dropout, which is off in evaluation, changed the variances that
they are averages of (Li et al. 2019, "variance shift").
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, UInt8

from facevae_jax.data.batches import gather_rows
from facevae_jax.data.pixels import open_splits
from facevae_jax.data.plan import BatchPlan
from facevae_jax.errors import UserError
from facevae_jax.generation import latent_tables
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.models.vae import VAE, Execution
from facevae_jax.random import named_key
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.state import make_model

IMAGES = 10_000  # of the training split that they are computed from, at most


def recalibrated(restored: RestoredModel, folder: pathlib.Path, *, batch_size: int = 0) -> TrainedVAE:
    """The model with statistics of whole training batches without dropout, and the moments of its new latents.

    Args:
      restored: the model.
      folder: where it was read from.
      batch_size: see `TrainedVAE`.

    Raises:
      UserError: it has no batch normalisation; the data are not there.
    """
    config = restored.config
    if config.model.kind == "pca" or config.model.normalization != "batch":
        raise UserError("--recalibrate: this model has no batch normalisation, whose statistics could be computed.")
    pixels = open_splits(config.data).train
    variables = {**restored.variables, "batch_stats": batch_statistics(restored, pixels)}
    trained = TrainedVAE(restored._replace(variables=variables), folder=folder, batch_size=batch_size)
    posterior = latent_tables.encode_split(trained, latent_tables.evaluation_split(trained)).posterior
    trained.moments = LatentMoments.of(*posterior)
    return trained


def batch_statistics(restored: RestoredModel, pixels: UInt8[np.ndarray, "n h w c"]) -> Any:
    """Mean and variance of every normalised channel over training batches, each normalised by its own moments."""
    config = restored.config
    quiet = dataclasses.replace(config.model, dropout_rate=0.0, batch_norm_momentum=0.0)  # 0: the batch's alone
    form = make_model(config).execution.form
    model = VAE(quiet, config.data.resolution, Execution(form), config.components)
    variables = jax.tree.map(lambda leaf: leaf.addressable_data(0), restored.variables)
    size = min(config.train.batch_size, len(pixels))
    batches = max(1, min(IMAGES, len(pixels)) // size)
    plan = BatchPlan(config.train.seed, len(pixels), size)

    key = named_key(config.train.seed, "recalibrate")

    @jax.jit
    def moments(variables: Any, number: Array, images: Array) -> Any:
        noise = jax.random.normal(jax.random.fold_in(key, number), (size, quiet.latent_dim))
        _, updates = model.apply(variables, images, noise, train=True, mutable=["batch_stats"])
        statistics = flatten_dict(updates["batch_stats"])
        # As sums of means and of squares: the variance over all images is more than the mean of the batches' own.
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
