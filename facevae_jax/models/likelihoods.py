"""Decoder likelihoods p(x | z): what a decoder's last layer gives, and how an image is scored under it.

A new one is a class here and a line in `LIKELIHOODS`. Gaussians share one formula, so that a batch's loss needs no
more than its mean squared error.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from facevae_jax.core.settings import check
from facevae_jax.models.blocks import by_channel, by_image

# Of pixels rounded to 1/255: uniform noise of that width. A Gaussian narrower than the rounding describes nothing.
MIN_VARIANCE = 1.0 / (12.0 * 255.0**2)
# Learned from here; a trained model's is around 0.01, which Adam would not reach from 1 in a short run.
INITIAL_VARIANCE = 0.05
LEARNED_VARIANCE = "decoder_log_variance"  # its name among the parameters

LEVELS = 255.0  # from 0 to the largest value; a pixel in [0, 1] is a multiple of 1 / LEVELS
INITIAL_LOG_SCALE = -2.5  # a standard deviation of 0.15; that of faces' pixels is twice as large
# exp(-7.5) is an eighth of a gray level, where one value has all of the probability; exp(1) makes all values equal.
LOG_SCALE_RANGE = (-7.5, 1.0)
COLOR_LOG_SCALE_RANGE = (-7.0, 7.0)  # of pixels from -1 to 1; published without the upper end, where exp overflows


class LogisticMixture(NamedTuple):
    """A mixture of discretized logistics for each pixel (Salimans et al. 2017, section 2.1).

    Unlike a Gaussian's density it is a probability: its nats are bits of a lossless code. A component has a mean and a
    scale for each color, and one weight for all three, which lets colors depend on each other.
    """

    log_weights: Float[Array, "*b h w k"]
    means: Float[Array, "*b h w c k"]  # in [0, 1]
    log_scales: Float[Array, "*b h w c k"]  # in units of [0, 1]
    # Of red in the mean of green, of red and of green in that of blue (Salimans et al. 2017, eq. 3); None: all 0
    coefficients: Float[Array, "*b h w 3 k"] | None = None

    def mean(self) -> Float[Array, "*b h w c"]:
        """The means of the components, by their weights: the picture.

        The mean of the 8-bit values lies further inwards where tails reach beyond black and white: by 0.04 at 0.03 with
        the scale of a new network, by 0.01 with one of e^-3.5.
        """
        if self.coefficients is None:
            return jnp.sum(jnp.exp(self.log_weights)[..., None, :] * self.means, axis=-1)
        red, green, blue = (self.means[..., color, :] for color in range(3))
        first, second, third = (self.coefficients[..., number, :] for number in range(3))
        red = jnp.clip(red, 0.0, 1.0)
        green = jnp.clip(green + first * (red - 0.5), 0.0, 1.0)
        blue += second * (red - 0.5) + third * (green - 0.5)
        colors = jnp.stack([red, green, jnp.clip(blue, 0.0, 1.0)], axis=-2)
        return jnp.sum(jnp.exp(self.log_weights)[..., None, :] * colors, axis=-1)

    def means_given(self, images: Float[Array, "*b h w c 1"]) -> Float[Array, "*b h w c k"]:
        """The means of each color, given those before it."""
        if self.coefficients is None:
            return self.means
        red, green = images[..., 0, :] - 0.5, images[..., 1, :] - 0.5
        first, second, third = (self.coefficients[..., number, :] for number in range(3))
        return self.means + jnp.stack([jnp.zeros_like(first), first * red, second * red + third * green], axis=-2)

    def log_probability(self, images: Float[Array, "*b h w c"], *, bits: int = 8) -> Float[Array, "*b"]:
        """Of images whose pixels are multiples of 1 / 255; nats, the sum over the pixels.

        A value's probability is that of its gray level's width; the first and the last level also get what lies
        outside. s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)) with the sigmoid s has an exact logarithm, however narrow.

        Args:
          images: [..., h, w, c].
          bits: that are scored of each value, the highest: with 5 of them 0 to 7 count as 0, and 248 to 255 as 248.
        """
        step = 2 ** (8 - bits)  # gray levels that count as one
        if step > 1:
            images = jnp.floor(jnp.round(images * LEVELS) / step) * (step / LEVELS)
        x, half, last = images[..., None], 0.5 * step / LEVELS, (LEVELS + 1.0 - step) / LEVELS
        means, inverse_scales = self.means_given(x), jnp.exp(-self.log_scales)
        above = (x + half - means) * inverse_scales
        below = (x - half - means) * inverse_scales
        to_the_left = jnp.where(x > last - 0.5 * half, 0.0, _by_number(jax.nn.log_sigmoid, above))
        to_the_right = jnp.where(x < 0.5 * half, 0.0, _by_number(jax.nn.log_sigmoid, -below))
        width = _by_number(lambda x: jnp.log(-jnp.expm1(-x)), inverse_scales * step / LEVELS)
        inside = (x > 0.5 * half) & (x < last - 0.5 * half)
        of_colors = to_the_left + to_the_right + jnp.where(inside, width, 0.0)
        of_pixels = jax.nn.logsumexp(self.log_weights + jnp.sum(of_colors, axis=-2), axis=-1)
        return jnp.sum(of_pixels, axis=(-2, -1))


def _by_number(function: Callable[[Array], Array], x: Array) -> Array:
    """A function of each number: of one long vector, since rows of a few components do not fill a CPU's vectors."""
    return function(x.reshape(-1)).reshape(x.shape)


class Logits(NamedTuple):
    """The logits of pixels, raw + bias, as a convolution gives them."""

    raw: Shaped[Array, "b h w c"]  # in the dtype of the computation
    bias: Float[Array, " c"]


class Decoded(NamedTuple):
    """p(x | z) as a decoder gives it."""

    mean: Float[Array, "*b h w c"]  # in [0, 1], float32
    distribution: LogisticMixture | None = None  # None: a Gaussian around the mean
    logits: Logits | None = None  # of the mean, where the error is to be computed by `squared_error`


class PixelTerms(NamedTuple):
    """What each image adds to the reconstruction term."""

    squared_error: Float[Array, "*b"]  # mean over the pixel values of (x - x')², pixels in [0, 1]
    nll: Float[Array, "*b"]  # nats: -log p(x | z) of a discrete likelihood; 0 of a Gaussian


@jax.custom_vjp
def squared_error(
    images: Float[Array, "b h w c"], raw: Shaped[Array, "b h w c"], bias: Float[Array, " c"]
) -> Float[Array, " b"]:
    """The mean over an image's pixel values of (x - sigmoid(raw + bias))². Images have no gradient.

    A TPU's registers hold 8 or 16 channels of a place of 128 images, so a pass over three channels takes as long as one
    over 8. The gradient that JAX derives takes a pass of its own for the bias, and computes the slopes again for each
    convolution. Here the pass that computes the error gives both.
    """
    return _squared_error(images, raw, bias)[0]


def _squared_error(images: Array, raw: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    mean = jax.nn.sigmoid(raw.astype(jnp.float32) + by_channel(bias, raw))
    difference = mean - images
    slope = difference * mean * (1.0 - mean)  # of the error, up to a factor
    parts = jnp.mean(jnp.square(difference), axis=(1, 2, 3)), slope.astype(raw.dtype), jnp.sum(slope, axis=(1, 2))
    # Without the barrier XLA computes the slopes again where they are read.
    error, slope, total = lax.optimization_barrier(parts)
    return error, (slope, total)


def _squared_error_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[None, Array, Array]:
    slope, total = residuals
    factor = gradient * (2.0 / math.prod(slope.shape[1:]))
    return None, (slope.astype(jnp.float32) * by_image(factor)).astype(slope.dtype), factor @ total


squared_error.defvjp(_squared_error, _squared_error_gradients)


@dataclasses.dataclass(frozen=True)
class GaussianLikelihood:
    """N(x'(z), variance): a density over pixels in [0, 1]. `gaussian` estimates its variance (Rybkin et al. 2021)."""

    dimensions: int  # D, the number of pixel values of an image
    learned: bool = False  # the variance is a parameter; else the optimum of each batch

    discrete: ClassVar[bool] = False  # whether it is a probability of whole values, not a density
    label: ClassVar[str] = "Gaussian"

    @classmethod
    def of(cls, objective: Any, dimensions: int) -> "GaussianLikelihood":
        """The likelihood that an `ObjectiveConfig` asks for."""
        return cls(dimensions, learned=objective.variance == "learned")

    @classmethod
    def check_run(cls, run: Any) -> None:
        """Raises a ValueError for settings that this likelihood cannot take."""
        components, bits = run.objective.mixture_components, run.objective.bits
        check(components == 1, "objective.mixture_components", components, "1 for a likelihood that is no mixture")
        check(bits == 8, "objective.bits", bits, "8 for a likelihood that is no probability of whole numbers")

    @classmethod
    def describe(cls, objective: Any) -> str:
        """How reconstruction is weighed, in a few words."""
        return f"gaussian, {objective.variance} variance"

    def channels(self, colors: int) -> int:
        """Numbers that a decoder gives for each pixel."""
        return colors

    def decode(self, raw: Float[Array, "*b h w f"]) -> Decoded:
        """What the decoder's last layer says of the pixels."""
        return Decoded(jax.nn.sigmoid(raw))

    @property
    def means_are_sigmoids(self) -> bool:
        """Whether `decode_with_bias` can be used: `decode` is that of this class."""
        return type(self).decode is GaussianLikelihood.decode

    def decode_with_bias(self, raw: Shaped[Array, "b h w c"], bias: Float[Array, " c"]) -> Decoded:
        """`decode` of raw + bias, with what `terms` needs to compute the error by `squared_error`."""
        return self.decode(raw.astype(jnp.float32) + by_channel(bias, raw))._replace(logits=Logits(raw, bias))

    def initial_params(self) -> dict[str, Array]:
        """Parameters beside the model's, at step 0."""
        return {LEARNED_VARIANCE: jnp.log(INITIAL_VARIANCE)} if self.learned else {}

    def terms(self, images: Float[Array, "b ..."], decoded: Decoded) -> PixelTerms:
        """Per-image terms of images in [0, 1]."""
        if decoded.logits is not None:
            error = squared_error(images, *decoded.logits)
        else:
            error = jnp.mean(jnp.square(images - decoded.mean), axis=tuple(range(1, images.ndim)))
        return PixelTerms(error, jnp.zeros_like(error))

    def batch_variance(self, mse: Float[Array, ""], params: Any) -> Float[Array, ""]:
        """The variance for a training batch: the parameter, or the optimum, which is the batch's error."""
        if self.learned:
            return jnp.maximum(jnp.exp(params[LEARNED_VARIANCE]), MIN_VARIANCE)
        # At the optimum the loss does not change with the variance, so holding it fixed leaves the gradient exact
        # (Rybkin et al. 2021, section 3.3).
        return lax.stop_gradient(jnp.maximum(mse, MIN_VARIANCE))

    def evaluation_variance(self, running: Float[Array, ""], params: Any) -> Float[Array, ""]:
        """The variance for evaluation: what training arrived at, never fitted to the evaluated images.

        Args:
          running: the mean of `batch_variance` over the last training batches.
          params: those that are evaluated.
        """
        return self.batch_variance(running, params) if self.learned else running

    def nll(self, means: PixelTerms, variance: Float[Array, ""]) -> Float[Array, ""]:
        """-log p(x | z) of a batch or a split, nats, from the means of its terms over the images."""
        return 0.5 * self.dimensions * (jnp.log(2.0 * jnp.pi * variance) + means.squared_error / variance)

    def reconstruction(self, means: PixelTerms, nll: Float[Array, ""]) -> Float[Array, ""]:
        """The term that is minimized."""
        return nll

    def log_prob(
        self, images: Float[Array, "b ..."], decoded: Decoded, variance: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """log p(x | z) of each image, nats."""
        terms = self.terms(images, decoded)
        return -jax.vmap(lambda error, nll, variance: self.nll(PixelTerms(error, nll), variance))(*terms, variance)


@dataclasses.dataclass(frozen=True)
class MseLikelihood(GaussianLikelihood):
    """`mse`: r_loss_factor x mean squared error (the paper's), which is a Gaussian of variance D / (2 r)."""

    r_loss_factor: float = 1.0

    @classmethod
    def of(cls, objective: Any, dimensions: int) -> "MseLikelihood":  # noqa: D102
        return cls(dimensions, r_loss_factor=objective.r_loss_factor)

    @classmethod
    def describe(cls, objective: Any) -> str:  # noqa: D102
        return f"r = {objective.r_loss_factor:,.6g}"

    def batch_variance(self, mse: Float[Array, ""], params: Any) -> Float[Array, ""]:  # noqa: D102
        return jnp.asarray(self.dimensions / (2.0 * self.r_loss_factor))

    def evaluation_variance(self, running: Float[Array, ""], params: Any) -> Float[Array, ""]:  # noqa: D102
        return self.batch_variance(running, params)

    def reconstruction(self, means: PixelTerms, nll: Float[Array, ""]) -> Float[Array, ""]:  # noqa: D102
        return self.r_loss_factor * means.squared_error


@dataclasses.dataclass(frozen=True)
class LogisticLikelihood(GaussianLikelihood):
    """`discretized_logistic`: a probability of the 8-bit values. The variance is for the log: the batch's optimum."""

    components: int = 1  # of the mixture for each pixel
    bits: int = 8  # of each pixel value that are scored

    discrete: ClassVar[bool] = True
    label: ClassVar[str] = "discretized logistic"

    @classmethod
    def of(cls, objective: Any, dimensions: int) -> "LogisticLikelihood":  # noqa: D102
        return cls(dimensions, components=objective.mixture_components, bits=objective.bits)

    @classmethod
    def check_run(cls, run: Any) -> None:  # noqa: D102
        needs = f"False where config.objective.likelihood is {run.objective.likelihood}, whose pixels are whole numbers"
        check(not run.data.dequantize, "data.dequantize", True, needs)

    @classmethod
    def describe(cls, objective: Any) -> str:  # noqa: D102
        return f"discretized logistic, {objective.mixture_components} to a pixel{_of_bits(objective)}"

    def channels(self, colors: int) -> int:
        """Means and scales of each color, and the weights where there are several components."""
        return self.components * (2 * colors + (self.components > 1))

    def decode(self, raw: Float[Array, "*b h w f"]) -> Decoded:
        """The mixture that the last layer describes: means before scales before weights."""
        colors = (raw.shape[-1] // self.components) // 2
        size = self.components * colors
        means, log_scales, logits = jnp.split(raw, [size, 2 * size], -1)
        shape = (*raw.shape[:-1], self.components, colors)
        means, log_scales = (part.reshape(shape).swapaxes(-1, -2) for part in (means, log_scales))
        logits = logits if self.components > 1 else jnp.zeros((*raw.shape[:-1], 1))
        mixture = LogisticMixture(
            log_weights=jax.nn.log_softmax(logits),
            means=jax.nn.sigmoid(means),
            log_scales=jnp.clip(log_scales + INITIAL_LOG_SCALE, *LOG_SCALE_RANGE),
        )
        return Decoded(mixture.mean(), mixture)

    def terms(self, images: Float[Array, "b ..."], decoded: Decoded) -> PixelTerms:  # noqa: D102
        assert decoded.distribution is not None
        nll = -decoded.distribution.log_probability(images, bits=self.bits)
        return super().terms(images, decoded)._replace(nll=nll)

    def nll(self, means: PixelTerms, variance: Float[Array, ""]) -> Float[Array, ""]:
        """-log of the probability, nats; the variance does not matter."""
        return means.nll


@dataclasses.dataclass(frozen=True)
class ColorLogisticLikelihood(LogisticLikelihood):
    """`color_logistic`: `discretized_logistic` whose colors depend on each other (Salimans et al. 2017, eq. 3).

    Very Deep VAEs have it. The network gives numbers for pixels from -1 to 1.
    """

    label: ClassVar[str] = "discretized logistic of dependent colors"

    @classmethod
    def describe(cls, objective: Any) -> str:  # noqa: D102
        of_colors = f"discretized logistic of dependent colors, {objective.mixture_components} to a pixel"
        return f"{of_colors}{_of_bits(objective)}"

    def channels(self, colors: int) -> int:
        """A weight of each component; a mean, a scale and a coefficient of each component and color."""
        return self.components * (1 + 3 * colors)

    def decode(self, raw: Float[Array, "*b h w f"]) -> Decoded:
        """The mixture that the last layer describes: weights, then means, scales and coefficients of each color."""
        logits, rest = raw[..., : self.components], raw[..., self.components :]
        rest = rest.reshape(*raw.shape[:-1], -1, 3, self.components)  # color, kind, component
        means, log_scales, coefficients = (rest[..., kind, :] for kind in range(3))
        mixture = LogisticMixture(
            log_weights=jax.nn.log_softmax(logits),
            means=0.5 * (means + 1.0),
            log_scales=jnp.clip(log_scales, *COLOR_LOG_SCALE_RANGE) - math.log(2.0),
            coefficients=jnp.tanh(coefficients),
        )
        return Decoded(mixture.mean(), mixture)


def _of_bits(objective: Any) -> str:
    return "" if objective.bits == 8 else f", {objective.bits} bits"


LIKELIHOODS: dict[str, type[GaussianLikelihood]] = {
    "mse": MseLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized_logistic": LogisticLikelihood,
    "color_logistic": ColorLogisticLikelihood,
}


def make_likelihood(objective: Any, image_shape: tuple[int, ...]) -> GaussianLikelihood:
    """The likelihood of an `ObjectiveConfig` for images of a shape."""
    return LIKELIHOODS[objective.likelihood].of(objective, math.prod(image_shape))
