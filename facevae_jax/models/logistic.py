"""A decoder's distribution over 8-bit pixels: a mixture of discretized logistics (Salimans et al. 2017, section 2.1).

Unlike a Gaussian's density it is a probability: its nats are bits of a lossless code. A component has a mean and
a scale of its own for each colour, and one weight for all three, which is how colours come to depend on each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LEVELS = 255.0  # from 0 to the largest value; a pixel in [0, 1] is a multiple of 1 / LEVELS
INITIAL_LOG_SCALE = -2.5  # a standard deviation of 0.15, of which faces' pixels have twice as much
# exp(-7.5) is an eighth of a grey level, where one value has all of the probability; exp(1) makes all values equal.
LOG_SCALE_RANGE = (-7.5, 1.0)


class LogisticMixture(NamedTuple):
    """For each pixel, components of which each has a weight, and a mean and a scale for each colour."""

    log_weights: Float[Array, "*b h w k"]
    means: Float[Array, "*b h w k c"]  # in [0, 1]
    log_scales: Float[Array, "*b h w k c"]  # in units of [0, 1]

    def mean(self) -> Float[Array, "*b h w c"]:
        """The means of the components, by their weights: the picture.

        Of 8-bit values the mean is further inwards where tails reach beyond black and white, which count as these: by
        0.04 at 0.03 with the scale of a new network, by 0.01 with one of e^-3.5.
        """
        return jnp.sum(jnp.exp(self.log_weights)[..., None] * self.means, axis=-2)

    def log_probability(self, images: Float[Array, "*b h w c"]) -> Float[Array, "*b"]:
        """Of images whose pixels are multiples of 1 / 255; nats, the sum over the pixels.

        A value's probability is that of its grey level's width, to which the first and the last add what lies outside:
        s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)) with the sigmoid s, whose logarithm is exact however narrow it is.
        """
        x = images[..., None, :]
        inverse_scales = jnp.exp(-self.log_scales)
        above = (x + 0.5 / LEVELS - self.means) * inverse_scales
        below = (x - 0.5 / LEVELS - self.means) * inverse_scales
        to_the_left = jnp.where(x > 1.0 - 0.25 / LEVELS, 0.0, jax.nn.log_sigmoid(above))
        to_the_right = jnp.where(x < 0.25 / LEVELS, 0.0, jax.nn.log_sigmoid(-below))
        width = jnp.log(-jnp.expm1(-inverse_scales / LEVELS))
        inside = (x > 0.25 / LEVELS) & (x < 1.0 - 0.25 / LEVELS)
        of_colours = to_the_left + to_the_right + jnp.where(inside, width, 0.0)
        of_pixels = jax.nn.logsumexp(self.log_weights + jnp.sum(of_colours, axis=-1), axis=-1)
        return jnp.sum(of_pixels, axis=(-2, -1))


def output_channels(components: int, colours: int) -> int:
    """Numbers that a decoder gives for each pixel: means and scales of each colour, and of several the weights."""
    return components * (2 * colours + (components > 1))


def from_outputs(raw: Float[Array, "b h w f"], components: int, colours: int) -> LogisticMixture:
    """The mixture that a decoder's last layer describes: means before scales before weights."""
    size = components * colours
    means, log_scales = (
        part.reshape(*raw.shape[:3], components, colours) for part in jnp.split(raw[..., : 2 * size], 2, -1)
    )
    logits = raw[..., 2 * size :] if components > 1 else jnp.zeros((*raw.shape[:3], 1))
    return LogisticMixture(
        log_weights=jax.nn.log_softmax(logits),
        means=jax.nn.sigmoid(means),
        log_scales=jnp.clip(log_scales + INITIAL_LOG_SCALE, *LOG_SCALE_RANGE),
    )
