"""Scores of reconstructions: mean squared error, PSNR, SSIM and MS-SSIM, which dm-pix lacks."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW = 11  # pixels along one side of the Gaussian window, and its standard deviation (Wang et al. 2004)
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # of pixels in [0, 1]
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # the finest scale first (Wang, Simoncelli & Bovik 2003)
# Means under the window are products with banded matrices, of few rows and images at a time so that they fit the cache:
# a quarter of the time of shifted sums.
ROWS_AT_ONCE = 24
IMAGES_AT_ONCE = 4
SMALLEST_ERROR = 1e-10  # the PSNR of an exact reconstruction is 100 dB, not infinite


class ImageScores(NamedTuple):
    """Scores of each image, pixels in [0, 1]."""

    mse: Float[Array, " b"]  # mean squared error per pixel value
    psnr: Float[Array, " b"]  # dB
    ssim: Float[Array, " b"]
    ms_ssim: Float[Array, " b"]


def image_scores(images: Float[Array, "b h w c"], reconstructions: Float[Array, "b h w c"]) -> ImageScores:
    """All scores of images and their reconstructions, both in [0, 1]."""
    mse = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
    whole, contrasts = ms_ssim_parts(images, reconstructions)
    return ImageScores(mse, psnr(mse), whole[0], combine_scales(whole, contrasts))


def psnr(mse: Float[Array, " b"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error of pixels in [0, 1]."""
    return -10.0 * jnp.log10(jnp.maximum(mse, SMALLEST_ERROR))


def scales(resolution: int) -> int:
    """Scales of MS-SSIM, each half the previous one, that the window fits into: five from 176 pixels on."""
    return max(1, sum(resolution >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS))))


def ms_ssim_parts(
    images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]
) -> tuple[Float[Array, "s b"], Float[Array, "s b"]]:
    """SSIM, and its contrast-structure factor alone, on each scale."""

    def of_few(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        parts = []
        for scale in range(scales(images.shape[1])):
            if scale:
                pair = _halve(pair[0]), _halve(pair[1])
            parts.append(_similarity(*pair))
        whole, contrasts = zip(*parts, strict=True)
        return jnp.stack(whole), jnp.stack(contrasts)

    few = math.gcd(IMAGES_AT_ONCE, images.shape[0])
    whole, contrasts = jax.lax.map(of_few, tuple(x.reshape(-1, few, *x.shape[1:]) for x in (images, others)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (whole, contrasts))  # type: ignore[return-value]


def combine_scales(whole: Float[Array, "s b"], contrasts: Float[Array, "s b"]) -> Float[Array, " b"]:
    """MS-SSIM: contrast-structure factors of all scales and the luminance of the last, each to the power of its weight.

    With fewer than five scales, their weights are scaled to a sum of 1.
    """
    weights = np.array(SCALE_WEIGHTS[: len(whole)]) / sum(SCALE_WEIGHTS[: len(whole)])
    factors = jnp.concatenate([contrasts[:-1], whole[-1:]])
    return jnp.prod(jnp.maximum(factors, 0.0) ** weights[:, None], axis=0)  # negative for opposite structures


def _similarity(
    a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Means over positions and channels of SSIM and of its contrast-structure factor (Wang et al. 2004, eq. 13)."""
    # Stacked as images: stacked as channels they took a quarter longer.
    maps = _blur(jnp.concatenate([a, b, a * a + b * b, a * b]))
    mean_a, mean_b, squares, product = jnp.split(maps, 4)
    mean_product, mean_squares = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
    contrast = (2.0 * (product - mean_product) + C2) / (squares - mean_squares + C2)
    luminance = (2.0 * mean_product + C1) / (mean_squares + C1)
    return jnp.mean(luminance * contrast, axis=(1, 2, 3)), jnp.mean(contrast, axis=(1, 2, 3))


@functools.cache
def _band(rows: int) -> Float[np.ndarray, "rows rows+10"]:
    """The Gaussian window, shifted by one position in each row."""
    weights = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    band = np.zeros((rows, rows + WINDOW - 1), np.float32)
    for row in range(rows):
        band[row, row : row + WINDOW] = weights / weights.sum()
    return band


def _blur(x: Float[Array, "b h w c"]) -> Float[Array, "b w2 h2 c"]:
    """Weighted means under the window, without padding: vertically, then horizontally, which transposes the image."""
    for _ in range(2):
        batch, height, width, channels = x.shape
        size = height - WINDOW + 1
        rows = min(ROWS_AT_ONCE, size)
        flat, parts = x.reshape(batch, height, -1), []
        for at in range(0, size, rows):
            start = min(at, size - rows)  # the last part overlaps the previous one, so that all have one shape
            window = flat[:, start : start + rows + WINDOW - 1]
            part = jnp.einsum("ok,bkm->bom", _band(rows), window, precision=jax.lax.Precision.HIGHEST)
            parts.append(part[:, at - start :])
        x = jnp.concatenate(parts, axis=1).reshape(batch, size, width, channels).swapaxes(1, 2)
    return x


def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Means of 2x2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
