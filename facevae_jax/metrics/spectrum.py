"""Checkerboards: how much of an image lies at the highest frequency, that of a grid of single pixels.

A decoder that doubles the resolution by transposed convolutions leaves a fine cross-hatch there.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, UInt8

from facevae_jax.latents.temperature import Temperature
from facevae_jax.trained.codes import image_blocks
from facevae_jax.trained.model import TrainedModel

IMAGES = 1_000  # of each set, at most


def checkerboard(batches: Iterable[UInt8[np.ndarray, "_ h w 3"]]) -> float:
    """Power at (pi, pi) over power at (3 pi/4, 3 pi/4), of the mean spectrum of the gray images without their means.

    About 0.2 for photographs. Of blurred images without a grid it is below 1, since the edges of the frame remain.
    """
    total: Float64[np.ndarray, "h w"] | float = 0.0
    for images in batches:
        gray = images.astype(np.float64).mean(axis=3)
        gray -= gray.mean(axis=(1, 2), keepdims=True)
        total = total + np.square(np.abs(np.fft.fft2(gray))).sum(axis=0)
    power = np.asarray(total)
    height, width = power.shape
    return float(power[height // 2, width // 2] / max(power[3 * height // 8, 3 * width // 8], 1e-30))


def checkerboards(
    trained: TrainedModel, split: str, *, prior: str, seed: int, temperature: Temperature = 1.0
) -> dict[str, float]:
    """Of the first images of a split, of their reconstructions and of as many samples."""
    pixels, size = trained.dataset.images(split)[:IMAGES], trained.inference.batch_size
    return {
        "originals": checkerboard(image_blocks(pixels, size)),
        "reconstructions": checkerboard(map(trained.reconstruct, image_blocks(pixels, size))),
        "samples": checkerboard(trained.sample_stream(len(pixels), prior=prior, temperature=temperature, seed=seed)),
    }
