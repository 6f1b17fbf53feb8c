"""The loss, in the one place where it is written: decoder likelihood plus weighted KL divergence.

Per-image terms are additive, so training averages them over a batch and evaluation over a whole split; `negative_elbo`
then makes the same figures of either. Sums run over pixels and latents, means over images only, and all is float32.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from facevae_jax.config import ObjectiveConfig
from facevae_jax.models.vae import Output, Posterior

# Of pixels rounded to 1/255: uniform noise of that width. A Gaussian narrower than the rounding describes nothing.
MIN_VARIANCE = 1.0 / (12.0 * 255.0**2)


class ImageTerms(NamedTuple):
    """What each image adds, before any weighting."""

    squared_error: Float[Array, " b"]  # mean over H, W, C of (x - x')^2, pixels in [0, 1]
    discrete_nll: Float[Array, " b"]  # nats: -log p(x | z) of `discretized_logistic`; 0 of the other likelihoods
    kl: Float[Array, "b z"]  # nats, per latent dimension


class Loss(NamedTuple):
    """The loss and its parts; `loss` is exactly `reconstruction` + `kl_term`."""

    loss: Float[Array, ""]  # what is minimised
    reconstruction: Float[Array, ""]  # r_loss_factor x mse, or nats of the likelihood
    kl_term: Float[Array, ""]  # the KL after free bits and weight
    mse: Float[Array, ""]  # mean squared error per pixel value, pixels in [0, 1]
    kl: Float[Array, ""]  # nats
    nll: Float[Array, ""]  # nats: -log N(x; x', variance), a density over pixels in [0, 1]; or -log of a probability
    negative_elbo: Float[Array, ""]  # nats: nll + kl
    variance: Float[Array, ""]  # of the decoder's Gaussian; the mse where there is none
    equivalent_r_loss_factor: Float[Array, ""]  # the r_loss_factor whose weight this variance has


def gaussian_kl(posterior: Posterior) -> Float[Array, "b z"]:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) per dimension, in nats (Kingma & Welling 2013, appendix B)."""
    mean, log_variance = posterior
    # expm1 keeps the difference of two near-equal numbers exact where the posterior is close to the prior.
    return 0.5 * (jnp.square(mean) + jnp.expm1(log_variance) - log_variance)


def bits_per_dim(negative_elbo: float, *, dimensions: int, discrete: bool) -> float:
    """Bits per pixel value of 8-bit images: an upper bound on the length of a lossless code of them.

    Args:
      negative_elbo: nats, of a `discrete` likelihood or of a density over pixels in [0, 1], which gives such a bound
        only where the targets were dequantized (Theis et al. 2016).
      dimensions: D, the number of pixel values of an image.
      discrete: whether it is a probability of the 8-bit values, not a density.
    """
    return negative_elbo / (dimensions * math.log(2.0)) + (0.0 if discrete else 8.0)


def image_terms(images: Float[Array, "b h w c"], output: Output) -> ImageTerms:
    """Per-image terms of images in [0, 1] and the model's output for them."""
    squared_error = jnp.mean(jnp.square(images - output.reconstruction), axis=(1, 2, 3))
    distribution = output.decoded.distribution
    nll = jnp.zeros_like(squared_error) if distribution is None else -distribution.log_probability(images)
    return ImageTerms(squared_error, nll, gaussian_kl(output.posterior))


def fixed_variance(config: ObjectiveConfig, *, dimensions: int) -> float:
    """The decoder variance that r_loss_factor implies: r x mse is the exponent of a Gaussian of variance D / (2 r)."""
    return dimensions / (2.0 * config.r_loss_factor)


def kl_weight(config: ObjectiveConfig, step: Array) -> Float[Array, ""]:
    """The KL weight at a step: linear from 0 over `kl_warmup_steps`, then `kl_weight`."""
    fraction = (step + 1.0) / (config.kl_warmup_steps + 1.0)
    return config.kl_weight * jnp.minimum(fraction, 1.0)


def negative_elbo(
    mse: Float[Array, ""],
    kl: Float[Array, " z"],
    *,
    discrete_nll: Float[Array, ""] | float,
    variance: Float[Array, ""],
    kl_weight: Float[Array, ""] | float,
    dimensions: int,
    config: ObjectiveConfig,
) -> Loss:
    """The loss of a batch or a split from the means of its `ImageTerms`.

    Args:
      mse: mean of `squared_error` over the images.
      kl: mean of `kl` over the images, nats per latent dimension.
      discrete_nll: mean of `discrete_nll` over the images, which `discretized_logistic` takes.
      variance: of the decoder's Gaussian; only the gaussian likelihood's loss depends on it.
      kl_weight: beta.
      dimensions: D, the number of pixel values of an image.
      config: likelihood, r_loss_factor and free bits.
    """
    if config.is_discrete:
        nll = jnp.asarray(discrete_nll)
    else:
        nll = 0.5 * dimensions * (jnp.log(2.0 * jnp.pi * variance) + mse / variance)
    reconstruction = config.r_loss_factor * mse if config.likelihood == "mse" else nll
    # On the mean over the batch, as in Kingma et al. 2016, eq. 15: a dimension below the bound gets no gradient.
    kl_term = kl_weight * jnp.sum(jnp.maximum(kl, config.free_bits))
    total_kl = jnp.sum(kl)
    return Loss(
        loss=reconstruction + kl_term,
        reconstruction=reconstruction,
        kl_term=kl_term,
        mse=mse,
        kl=total_kl,
        nll=nll,
        negative_elbo=nll + total_kl,
        variance=variance,
        equivalent_r_loss_factor=dimensions / (2.0 * variance),
    )
