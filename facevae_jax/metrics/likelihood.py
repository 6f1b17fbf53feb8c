"""The likelihood of images: the evidence lower bound, and the tighter importance-weighted one."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from facevae_jax.errors import UserError
from facevae_jax.latents.priors import normal_by_index
from facevae_jax.models.inference import Encoded, Inference
from facevae_jax.models.vae import VAE, Decoded, Posterior, to_unit
from facevae_jax.progress import progress_bar
from facevae_jax.random import named_key

SEED = 0  # of the noise: the same at every evaluation, so that models compare


def log_likelihood(
    targets: Float[Array, "*b h w c"], decoded: Decoded, variance: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """log p(x | z), nats: of the decoder's distribution, or of N(x'(z), variance), a density over pixels in [0, 1]."""
    if decoded.distribution is not None:
        return decoded.distribution.log_probability(targets)
    dimensions = math.prod(targets.shape[-3:])
    error = jnp.sum(jnp.square(targets - decoded.images), axis=(-3, -2, -1))
    return -0.5 * (dimensions * jnp.log(2.0 * jnp.pi * variance) + error / variance)


class Draws(NamedTuple):
    """Images, from whose posteriors latents are drawn."""

    images: Shaped[ArrayLike, "b h w c"]
    mean: Float[ArrayLike, "b z"]
    log_variance: Float[ArrayLike, "b z"]
    rows: Int[ArrayLike, " b"]  # of the images in their split, which with the number of the draw decide the noise
    first: Int[ArrayLike, " b"]  # number of the first draw
    variance: Float[ArrayLike, " b"]  # of the decoder's Gaussian, if it is one


def log_weights(model: VAE, variables: Any, given: Draws, *, count: int) -> Float[Array, "b k"]:
    """log p(x | z) p(z) / q(z | x) of `count` draws z from each posterior (Burda et al. 2016, eq. 8)."""
    mean, log_variance, variance = (jnp.asarray(x)[:, None] for x in (given.mean, given.log_variance, given.variance))
    key = named_key(SEED, "importance")

    def draw(row: Any, first: Any) -> Array:
        return normal_by_index(jax.random.fold_in(key, row), first + jnp.arange(count), mean.shape[-1])

    noise = jax.vmap(draw)(given.rows, given.first)
    latents = Posterior(mean, log_variance).sample(noise)
    decoded: Any = model.apply(variables, latents.reshape(-1, latents.shape[-1]), method="describe")
    decoded = jax.tree.map(lambda leaf: leaf.reshape(*latents.shape[:2], *leaf.shape[1:]), decoded)
    # log p(z) - log q(z | x): the factors of 2 pi cancel.
    ratio = 0.5 * jnp.sum(jnp.square(noise) + log_variance - jnp.square(latents), axis=-1)
    return log_likelihood(to_unit(jnp.asarray(given.images))[:, None], decoded, variance) + ratio


@functools.lru_cache(maxsize=8)
def _weigher(count: int) -> Callable[..., Any]:
    """One function for each count, by which compiled programs are found again."""
    return functools.partial(log_weights, count=count)


def importance_bounds(
    inference: Inference,
    images: Shaped[np.ndarray, "n h w c"],
    posterior: Encoded,
    *,
    variance: float,
    draws: Sequence[int],
) -> dict[int, Float[np.ndarray, " n"]]:
    """log 1/K sum of K importance weights for each image and each K of `draws`, nats; K = 1 is the ELBO.

    All come from the same draws, which a smaller K divides into groups whose bounds are averaged. So the bound of a
    larger K is never below that of a smaller one, by Jensen's inequality, whatever the draws.

    Args:
      inference: with the model.
      images: rows 0 to n - 1 of a split.
      posterior: theirs.
      variance: of the decoder's Gaussian; one that gives a distribution itself does without.
      draws: values of K, each a multiple of the one before.

    Raises:
      UserError: `draws` is empty, or one is no multiple of the one before.
    """
    check_draws(draws)
    most, size = draws[-1], min(inference.batch_size, len(images))
    # No more latents at once than a batch: pictures of several batches leave the cache before they are compared.
    each = next(count for count in range(inference.batch_size // size, 0, -1) if most % count == 0)
    numbers = range(0, most, each)

    def batches() -> Iterator[Draws]:
        for at, first in itertools.product(range(0, len(images), size), numbers):
            rows = np.arange(at, min(at + size, len(images)))
            of_each = np.full(len(rows), first), np.full(len(rows), variance, np.float32)
            yield Draws(images[rows], posterior.mean[rows], posterior.log_variance[rows], rows, *of_each)

    found: list[Any] = []
    with progress_bar(total=len(images) * most, description="importance", unit="draw") as progress:
        part: list[np.ndarray] = []
        for weights in inference.map_stream(_weigher(each), batches()):
            part.append(weights)
            progress.update(weights.size)
            if len(part) == len(numbers):
                found.append(_bounds(np.concatenate(part, axis=1), draws))
                part = []
    return {count: np.concatenate([bounds[count] for bounds in found]) for count in draws}


def check_draws(draws: Sequence[int]) -> None:
    """Raises a UserError unless each of `draws` is positive and a multiple of the one before."""
    if not draws or draws[0] < 1 or any(b % a or b <= a for a, b in itertools.pairwise(draws)):
        raise UserError(
            f"--importance_samples={','.join(map(str, draws))} must be growing numbers, each a multiple of the one "
            "before, such as 1,10,100,1000."
        )


def _bounds(weights: Float[np.ndarray, "b k"], draws: Sequence[int]) -> dict[int, Float[np.ndarray, " b"]]:
    """In float64: weights of thousands of pixels differ by many nats."""
    groups = {count: weights.astype(np.float64).reshape(len(weights), -1, count) for count in draws}
    return {count: np.logaddexp.reduce(g, axis=2).mean(axis=1) - math.log(count) for count, g in groups.items()}
