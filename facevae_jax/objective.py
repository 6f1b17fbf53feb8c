"""The loss, in the one place where it is written: decoder likelihood plus weighted KL divergence.

Per-image terms are additive, so training averages them over a batch and evaluation over a whole split; `loss_of` then
makes the same figures of either. Sums run over pixels and latents, means over images only, and all is float32.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from facevae_jax.config import ObjectiveConfig
from facevae_jax.models.api import Gaussian, Output
from facevae_jax.models.likelihoods import GaussianLikelihood, PixelTerms


class ImageTerms(NamedTuple):
    """What each image adds, before any weighting."""

    pixels: PixelTerms
    kl: tuple[Float[Array, "b ..."], ...]  # nats, of each latent dimension, a group of latents each


class Loss(NamedTuple):
    """The loss and its parts; `loss` is exactly `reconstruction` + `kl_term`."""

    loss: Float[Array, ""]  # what is minimized
    reconstruction: Float[Array, ""]  # r_loss_factor x mse, or nats of the likelihood
    kl_term: Float[Array, ""]  # the KL after free bits and weight
    mse: Float[Array, ""]  # mean squared error per pixel value, pixels in [0, 1]
    kl: Float[Array, ""]  # nats; the sum of `rates`
    rates: Float[Array, " g"]  # nats, of each group of latents from the top down; none of a model without a KL
    nll: Float[Array, ""]  # nats: -log N(x; x', variance), a density over pixels in [0, 1]; or -log of a probability
    negative_elbo: Float[Array, ""]  # nats: nll + kl
    variance: Float[Array, ""]  # of the decoder's Gaussian; the mse where there is none
    equivalent_r_loss_factor: Float[Array, ""]  # the r_loss_factor whose weight this variance has


def gaussian_kl(posterior: Gaussian, prior: Gaussian | None = None) -> Float[Array, "b ..."]:
    """KL(posterior || prior) of each dimension, nats (Kingma & Welling 2013, appendix B); N(0, 1) without a prior."""
    mean, log_ratio, scale = posterior.mean, posterior.log_variance, jnp.ones(())
    if prior is not None:
        scale = jnp.exp(-prior.log_variance)
        mean, log_ratio = posterior.mean - prior.mean, posterior.log_variance - prior.log_variance
    # expm1 keeps the difference of two near-equal numbers exact where the posterior is close to the prior.
    return 0.5 * (jnp.square(mean) * scale + jnp.expm1(log_ratio) - log_ratio)


def log_ratio(output: Output) -> Float[Array, " b"]:
    """log p(z) - log q(z | x) of the drawn latents, nats, summed over all groups (Burda et al. 2016, eq. 8)."""
    total = jnp.zeros(len(output.decoded.mean))
    for value, (mean, log_variance), prior in output.latents:
        posterior = jnp.square(value - mean) * jnp.exp(-log_variance) + log_variance
        other, other_log_variance = prior or (0.0, 0.0)
        against = jnp.square(value - other) * jnp.exp(-jnp.asarray(other_log_variance)) + other_log_variance
        total += 0.5 * jnp.sum((posterior - against).reshape(len(total), -1), axis=1)  # the factors of 2 pi cancel
    return total


def bits_per_dim(negative_elbo: float, *, dimensions: int, discrete: bool) -> float:
    """Bits per pixel value of 8-bit images: an upper bound on the length of a lossless code of them.

    Args:
      negative_elbo: nats, of a `discrete` likelihood or of a density over pixels in [0, 1], which gives such a bound
        only where the targets were dequantized (Theis et al. 2016).
      dimensions: D, the number of pixel values of an image.
      discrete: whether it is a probability of the 8-bit values, not a density.
    """
    return negative_elbo / (dimensions * math.log(2.0)) + (0.0 if discrete else 8.0)


def image_terms(images: Float[Array, "b ..."], output: Output, likelihood: GaussianLikelihood) -> ImageTerms:
    """Per-image terms of images in [0, 1] and the model's output for them."""
    kl = tuple(gaussian_kl(group.posterior, group.prior) for group in output.latents)
    return ImageTerms(likelihood.terms(images, output.decoded), kl)


def kl_weight(config: ObjectiveConfig, step: Array) -> Float[Array, ""]:
    """The KL weight at a step: linear from 0 over `kl_warmup_steps`, then `kl_weight`."""
    fraction = (step + 1.0) / (config.kl_warmup_steps + 1.0)
    return config.kl_weight * jnp.minimum(fraction, 1.0)


def _side(kl: Float[Array, "..."]) -> int:
    """The resolution of a group of latents; a vector is one place."""
    return kl.shape[0] if kl.ndim > 1 else 1


def loss_of(
    means: ImageTerms,
    *,
    variance: Float[Array, ""],
    kl_weight: Float[Array, ""] | float,
    likelihood: GaussianLikelihood,
    config: ObjectiveConfig,
) -> Loss:
    """The loss of a batch or a split.

    Args:
      means: of its `ImageTerms` over the images.
      variance: of the decoder's Gaussian, if it is one.
      kl_weight: beta.
      likelihood: of the decoder.
      config: its free bits are used.
    """
    nll = likelihood.nll(means.pixels, variance)
    reconstruction = likelihood.reconstruction(means.pixels, nll)
    rates = jnp.stack([jnp.sum(kl) for kl in means.kl]) if means.kl else jnp.zeros(0)
    # On the mean over the batch, as in Kingma et al. 2016, eq. 15: what is below the bound gets no gradient.
    parts = means.kl if config.free_bits_per == "dimension" else tuple(rates)
    counted = [jnp.sum(jnp.maximum(part, config.free_bits)) for part in parts]
    weighted = [config.kl_weight_at(_side(kl)) * part for kl, part in zip(means.kl, counted, strict=True)]
    kl_term = kl_weight * sum(weighted, jnp.zeros(()))
    kl = jnp.sum(rates)
    return Loss(
        loss=reconstruction + kl_term,
        reconstruction=reconstruction,
        kl_term=kl_term,
        mse=means.pixels.squared_error,
        kl=kl,
        rates=rates,
        nll=nll,
        negative_elbo=nll + kl,
        variance=variance,
        equivalent_r_loss_factor=likelihood.dimensions / (2.0 * variance),
    )
