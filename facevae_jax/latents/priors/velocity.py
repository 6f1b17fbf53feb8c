"""Networks of a flow: the velocity of a code at an angle, which starts at zero everywhere."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

FREQUENCIES = 16  # of the angle's embedding
EMBEDDING = 128  # its features
HEAD = 32  # features of an attention head

_ZEROS = nn.initializers.zeros


def _normalized(x: Float[Array, "... f"]) -> Float[Array, "... f"]:
    return nn.LayerNorm(use_bias=False, use_scale=False)(x)


class Modulated(nn.Module):
    """Layer normalization whose scale and shift come from the embedding (Perez et al. 2018; Peebles & Xie 2023)."""

    @nn.compact
    def __call__(self, x: Float[Array, "... f"], embedding: Float[Array, "c e"]) -> Float[Array, "... f"]:  # noqa: D102
        scale, shift = jnp.split(nn.Dense(2 * x.shape[-1], kernel_init=_ZEROS)(embedding), 2, axis=-1)
        shape = (-1, *[1] * (x.ndim - 2), x.shape[-1])
        return _normalized(x) * (1.0 + scale.reshape(shape)) + shift.reshape(shape)


class Velocity(nn.Module):
    """The velocity of whitened codes: of vectors by dense layers, of a grid [h, w, c] by attention between its places.

    The last layer starts at zero, and so the flow at the identity.
    """

    code_shape: tuple[int, ...]
    width: int
    blocks: int

    @nn.compact
    def __call__(
        self, codes: Float[Array, "b z"], angle: Float[Array, " a"], condition: Float[Array, "c k"]
    ) -> Float[Array, "b z"]:
        """Of codes, each with its own angle and condition, or one for all."""
        places, width = self.code_shape[:-1], self.width
        x = codes.reshape(-1, math.prod(places), self.code_shape[-1]) if places else codes
        phase = 2.0 * angle[:, None] * jnp.arange(FREQUENCIES, dtype=jnp.float32)[None]
        # Of the angle alone, which all samples share, so that it is computed once for all of them.
        embedding = nn.silu(nn.Dense(EMBEDDING)(jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)))
        x = nn.Dense(width)(x)
        if condition.shape[1]:
            x = x + nn.Dense(width, use_bias=False)(condition).reshape(-1, *[1] * (x.ndim - 2), width)
        if places:
            x = x + self.param("places", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.blocks):
            if places:
                attention: Any = nn.MultiHeadDotProductAttention(max(1, width // HEAD), out_kernel_init=_ZEROS)
                x = x + attention(Modulated()(x, embedding))
            y = nn.silu(nn.Dense(width * (2 if places else 1))(Modulated()(x, embedding)))
            x = x + nn.Dense(width, kernel_init=_ZEROS)(y)
        y = nn.Dense(self.code_shape[-1], kernel_init=_ZEROS)(Modulated()(x, embedding))
        return y.reshape(codes.shape)
