"""The contract of a model: all that the trainer, evaluation and tools know of one.

A model is a linen module in one file of this package. It draws its own noise from one key for each image, so a draw
depends on no batch, device or host, and it returns its latents as groups of any shape.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped, UInt8

from facevae_jax.core import random
from facevae_jax.models.blocks import BLOCK_BYTES
from facevae_jax.models.convolution import Form
from facevae_jax.models.likelihoods import Decoded

# exp(10) is a standard deviation of 148 in a prior of 1, and exp(-20) one of 5e-5: no useful posterior is outside, and
# neither exp nor the KL can overflow inside.
LOG_VARIANCE_RANGE = (-20.0, 10.0)

Dtype = Literal["float32", "bfloat16"]


class Gaussian(NamedTuple):
    """A diagonal Gaussian for each image, in float32."""

    mean: Float[Array, "b ..."]
    log_variance: Float[Array, "b ..."]

    @classmethod
    def bounded(cls, mean: Float[Array, "b ..."], log_variance: Float[Array, "b ..."]) -> "Gaussian":
        """In float32, with a log variance that neither the KL nor a draw overflows for."""
        return cls(mean.astype(jnp.float32), jnp.clip(log_variance.astype(jnp.float32), *LOG_VARIANCE_RANGE))

    @classmethod
    def point(cls, mean: Float[Array, "b ..."]) -> "Gaussian":
        """All but a point, e^-10 wide: the code of a model without draws."""
        return cls(mean, jnp.full_like(mean, LOG_VARIANCE_RANGE[0]))

    def sample(self, keys: Key[Array, " b"] | None) -> Float[Array, "b ..."]:
        """mean + exp(log_variance / 2) * noise, noise from N(0, I) (Kingma & Welling 2013, section 2.4).

        Args:
          keys: one for each image; None: the mean.
        """
        if keys is None:
            return self.mean
        return self.mean + jnp.exp(0.5 * self.log_variance) * random.normal(keys, self.mean.shape[1:])


class LatentGroup(NamedTuple):
    """One group of latents, of any shape [b, ...]."""

    value: Float[Array, "b ..."]  # drawn from the posterior
    posterior: Gaussian
    prior: Gaussian | None = None  # None: N(0, I); else what the groups above predict


class Output(NamedTuple):
    """What a forward pass gives."""

    decoded: Decoded
    latents: tuple[LatentGroup, ...]  # the top group first; none of a model without a KL divergence


@runtime_checkable
class Model(Hashable, Protocol):
    """A linen module; the methods are for use with `apply`."""

    init: Callable[..., Any]
    apply: Callable[..., Any]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        ...

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the code that tools use: (z,) of a flat one, (h, w, c) of a spatial one, the top groups of a hierarchy."""
        ...

    @property
    def detail_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the groups of a hierarchy below the code, from the top down; () of other models (`WholeCode`)."""
        ...

    @property
    def activation_size(self) -> int:
        """Numbers of the largest activation of an image, where it is much larger than images are; else 0."""
        ...

    def __call__(
        self,
        images: Shaped[Array, "b ..."],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Output:
        """Reconstructs images, uint8 or floats in [0, 1], from one draw of the posterior; one key for each image.

        Without keys each latent is the mean of its posterior.

        `weights` are those of the images in means over the batch, 1 on average: 0 of padding. None: all weigh 1.
        """
        ...

    def encode(self, images: Shaped[Array, "b ..."]) -> Gaussian:
        """The posterior of the code, for evaluation."""
        ...

    def details(self, images: Shaped[Array, "b ..."]) -> Float[Array, "b d"]:
        """The posterior means of the groups below the code, flat, in standard deviations from their priors' means."""
        ...

    def decode(self, code: Float[Array, "b ..."], details: Float[Array, "b d"] | None = None) -> Decoded:
        """p(x | code), for evaluation.

        `details` are values of the groups below the code, as of `details`: N(0, I) draws them from their priors. None:
        they are at their priors' means.
        """
        ...


class WholeCode:
    """Base of the models whose code is all of their latents."""

    @property
    def detail_shapes(self) -> tuple[tuple[int, ...], ...]:  # noqa: D102
        return ()

    @property
    def activation_size(self) -> int:  # noqa: D102
        return 0

    def details(self, images: Shaped[Array, "b ..."]) -> Float[Array, "b d"]:  # noqa: D102
        return jnp.zeros((images.shape[0], 0))


class Execution(NamedTuple):
    """How a model is computed; it changes the speed and the rounding alone."""

    form: Form = "plain"
    axis: str | None = None  # mesh axis that cuts a training batch; None: this device has the whole batch
    block_bytes: int = BLOCK_BYTES  # worked on at a time, in the form `matmul`; 0: the whole batch
    dtype: Dtype = "float32"  # of a config's `auto`
    few_launches: bool = False  # what can be one operation is one, since each is a launch of a GPU
    few_passes: bool = False  # arrays are seldom read or laid out anew, which takes most of a TPU's time

    def sum(self, tree: Any) -> Any:
        """The sum over the devices that have a part of the batch."""
        return all_reduce(tree, self.axis, joined=not self.few_passes) if self.axis else tree

    def dtype_of(self, setting: Literal["auto"] | Dtype) -> jnp.dtype:
        """The dtype of the computation that a config's setting means."""
        return jnp.dtype(self.dtype if setting == "auto" else setting)

    @property
    def devices(self) -> int:
        """How many have a part of the batch."""
        return lax.axis_size(self.axis) if self.axis else 1


def all_reduce(tree: Any, axis: str, *, joined: bool = True) -> Any:
    """The sum over the devices of a mesh axis.

    Args:
      tree: of arrays.
      axis: of the mesh.
      joined: sends them as one array, since starting an exchange costs more than its bytes. A TPU's compiler joins
        exchanges itself, without laying out their arrays anew.
    """
    if lax.axis_size(axis) == 1:
        return tree
    if not joined:
        return lax.psum(tree, axis)
    flat, unravel = ravel_pytree(tree)
    return unravel(lax.psum(flat, axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def all_reduce_for_loss(tree: Any, axis: str) -> Any:
    """`all_reduce` of what every device computes the same loss from: its gradient is the same on all, and not sent."""
    return all_reduce(tree, axis)


all_reduce_for_loss.defvjp(
    lambda tree, axis: (all_reduce(tree, axis), None),
    lambda axis, _, gradient: (jax.tree.map(lambda part: part * lax.axis_size(axis), gradient),),
)


def to_unit(images: Shaped[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Pixels 0..255 to float32 in [0, 1]; floats stay as they are."""
    return images.astype(jnp.float32) / 255.0 if jnp.issubdtype(images.dtype, jnp.integer) else images


def to_pixels(images: Float[Array, "b ..."]) -> UInt8[Array, "b ..."]:
    """[0, 1] to the nearest pixel value 0..255."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def image_keys(key: PRNGKeyArray, count: int) -> Key[Array, " n"]:
    """Keys for images 0 to `count` - 1, such as a notebook needs to call a model."""
    return random.keys_of(key, jnp.arange(count))
