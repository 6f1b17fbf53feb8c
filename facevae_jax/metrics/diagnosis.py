"""Why samples are poor: their distance from real faces, split into what the data, decoder and prior contribute."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.latents.temperature import Temperature
from facevae_jax.metrics.frechet import Extractor, features_of, frechet_distance
from facevae_jax.trained.codes import image_blocks
from facevae_jax.trained.model import TrainedModel

POOLED = 8  # squares along a side whose mean colors are features
BANDS = 3  # octaves of detail
CELLS = 2  # along a side, in each of which a band's energy is a feature
LEAST_IMAGES = 4

REMEDIES = {
    "data": "the estimate itself: more held-out images (--samples, a larger validation split)",
    "decoder": "reconstructions: train longer, a larger model.latent_dim, more model.filters",
    "posterior": "decoded posterior draws: a lower objective.kl_weight, or a larger model.latent_dim",
    "prior": "codes: --prior=flow with labels in the data, a lower --temperature, a smaller model.latent_dim",
}
HIERARCHY_REMEDIES = REMEDIES | {
    "decoder": "reconstructions: train longer, a larger model.width, more blocks",
    "posterior": "latents below the code, drawn from their priors: a lower --temperature from their resolution on, a "
    "larger model.code_resolution, train longer",
    "prior": "codes: --prior=flow, a lower --temperature",
}


def layout_and_detail(images: UInt8[np.ndarray, "n h w 3"]) -> Float64[np.ndarray, "n f"]:
    """Features that need no network: mean colors of 8 x 8 squares, and in each quarter the log energy of three octaves.

    The first say where things are, the second how sharp they are.
    """
    x = images.astype(np.float64) / 255.0
    pooled = _pooled(x, x.shape[1] // POOLED).reshape(len(x), -1)
    gray, details = x.mean(axis=3, keepdims=True), []
    for _ in range(BANDS):
        smaller = _pooled(gray, 2)
        detail = gray - smaller.repeat(2, axis=1).repeat(2, axis=2)
        details.append(_pooled(np.square(detail), detail.shape[1] // CELLS).reshape(len(x), -1))
        gray = smaller
    return np.concatenate([pooled, 0.1 * np.log(np.concatenate(details, axis=1) + 1e-6)], axis=1)


def _pooled(x: Float64[np.ndarray, "n h w c"], size: int) -> Float64[np.ndarray, "n h2 w2 c"]:
    """Means of squares of `size` pixels."""
    count, height, width, channels = x.shape
    return x.reshape(count, height // size, size, width // size, size, channels).mean(axis=(2, 4))


def diagnose(
    trained: TrainedModel,
    split: str,
    *,
    extract: Extractor,
    prior: str,
    count: int,
    temperature: Temperature = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Fréchet distances to one half of a split: of its other half, of what the model makes of that, and of samples.

    Each step on the way from real faces to samples can only lose something: other faces, their reconstructions, faces
    decoded from draws of their codes' posteriors (a hierarchy's finer groups from their priors), faces decoded from the
    prior. What the distance grows by is the step's part.

    Args:
      trained: the model.
      split: that the model was not trained on.
      extract: the features.
      prior: of the samples.
      count: images of the split, at most; each set has half as many.
      temperature: of the samples, and of the latents below the code of faces decoded from posteriors.
      seed: of the samples.

    Raises:
      UserError: the split is too small, or missing.
    """
    pixels, size = trained.dataset.images(split)[:count], trained.inference.batch_size
    half = len(pixels) // 2
    if half < LEAST_IMAGES // 2:
        raise UserError(
            f"--diagnose: the split {split!r} has {len(pixels)} images: {LEAST_IMAGES} at least are needed."
        )
    real = features_of(extract, image_blocks(pixels[half : 2 * half], size))

    def distance(batches: Iterable[UInt8[np.ndarray, "_ h w 3"]]) -> float:
        return frechet_distance(features_of(extract, batches), real)

    posterior = trained.inference.encode(np.asarray(pixels[:half]))
    draws = trained.posterior_sample(posterior, seed=seed)
    distances = {
        "data": distance(image_blocks(pixels[:half], size)),
        "decoder": distance(trained.inference.reconstruct_stream(image_blocks(pixels[:half], size))),
        "posterior": distance(
            trained.decode_draws(trained.inference.batches(draws), temperature=temperature, seed=seed)
        ),
        "prior": distance(trained.sample_stream(half, prior=prior, temperature=temperature, seed=seed)),
    }
    values = list(distances.values())
    parts = {name: value - before for (name, value), before in zip(distances.items(), [0.0, *values], strict=False)}
    largest = max(parts, key=lambda name: parts[name])
    remedy = (HIERARCHY_REMEDIES if trained.detail_size else REMEDIES)[largest]
    return {"images": half, "distances": distances, "parts": parts, "largest": largest, "remedy": remedy}
