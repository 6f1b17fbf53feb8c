"""A KL-regularized autoencoder with a spatial latent [h, w, c] (Rombach et al. 2022, section 3.1), without a GAN.

Pixels go through a patch of 2 x 2 or 4 x 4 to features at once, then through residual blocks, and come back by
depth-to-space: no convolution is dilated, and none leaves a checkerboard. A latent keeps the place of what it
describes, so reconstructions are sharper than those of a flat vector; samples need a prior that knows the whole grid.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from facevae_jax.core.settings import CHANNELS, check, check_all
from facevae_jax.models.api import Execution, Gaussian, LatentGroup, Output, WholeCode, to_unit
from facevae_jax.models.blocks import by_channel
from facevae_jax.models.convolution import depth_to_space, space_to_depth
from facevae_jax.models.layers import Features, GroupNorm, Pending, SameConvolution, UpsampledConvolution
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood

HEAD_PATCH = 2  # by which the head of kind `nearest` doubles
PATCHES = {4: 2, 8: 4}  # side of the first patch, by how much smaller than the image the latent grid is
MAX_CODE = 16_384  # numbers of a code, where their covariance takes 1 GiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network. A run keeps these for life: they decide which parameters exist and what they mean."""

    kind: Literal["autoencoder_kl"] = "autoencoder_kl"
    downsampling: Literal[4, 8] = 8  # the latent grid has the image's side divided by this
    latent_channels: int = 8  # numbers at each place of the grid
    width: int = 64  # channels at twice the grid's side; twice as many on the grid
    # How the last layer reaches pixels. patch: each place of the last grid gives a square, whose seams show as a grid
    head: Literal["nearest", "patch"] = "nearest"
    blocks: int = 1  # residual blocks at each of the two sides, in encoder and decoder
    activation: Literal["silu", "gelu", "relu", "leaky_relu"] = "silu"
    # Of the computation; parameters and sums stay float32. auto: bfloat16 in training on a TPU or GPU, else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    EARLIER: ClassVar[dict[str, Any]] = {"head": "patch"}  # where a saved config lacks the setting

    # What `models.layers` asks of a config.
    normalization = "group"
    kernel_size = 3
    batch_norm_momentum = 0.0
    dropout_rate = 0.0

    def __post_init__(self) -> None:
        check_all(self, "model", "latent_channels width blocks", lambda x: x > 0, "positive")

    def check_run(self, run: Any) -> None:
        """Raises a ValueError for settings of a `RunConfig` that this network cannot take."""
        size = (run.data.resolution // self.downsampling) ** 2 * self.latent_channels
        allowed = f"at most {MAX_CODE * self.latent_channels // size} at this resolution and downsampling"
        check(size <= MAX_CODE, "model.latent_channels", self.latent_channels, allowed)


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the last scaled to nothing at the start."""

    config: Config
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:  # noqa: D102
        y, width = x, x.shape[-1]
        for _ in range(2):
            pending = Pending(GroupNorm()(width), None)
            y = SameConvolution(width, self.config, self.execution)(Features(y, pending))[0].raw
        return x + by_channel(self.param("scale", nn.initializers.zeros, (width,)), y) * y


class Half(nn.Module):
    """One side of the network: residual blocks at both resolutions, with a change of resolution between them.

    A place of a grid is split into or joined from `patch` x `patch` ones by reshaping, then a dense layer.
    """

    config: Config
    execution: Execution
    features: int  # numbers that it gives at each place

    def dense(self, x: Float[Array, "b h w c"], features: int) -> Float[Array, "b h w f"]:
        """A 1x1 convolution."""
        init = nn.initializers.glorot_uniform()
        dtype = self.execution.dtype_of(self.config.dtype)
        return nn.Dense(features, dtype=dtype, kernel_init=init)(x).astype(jnp.float32)

    def blocks(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Residual blocks."""
        for _ in range(self.config.blocks):
            x = Residual(self.config, self.execution)(x)
        return x

    def normalized(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Before the last layer."""
        return Pending(GroupNorm()(x.shape[-1]), None).apply(x, self.config)


class Encoder(Half):
    """Images to the numbers of the posterior."""

    @nn.compact
    def __call__(self, images: Shaped[Array, "b r r 3"]) -> Float[Array, "b h w f"]:  # noqa: D102
        patches = space_to_depth(to_unit(images) - 0.5, PATCHES[self.config.downsampling])
        x = self.blocks(self.dense(patches, self.config.width))
        x = self.blocks(self.dense(space_to_depth(x, 2), 2 * self.config.width))
        return self.dense(self.normalized(x), self.features)


class Decoder(Half):
    """Codes to what the likelihood needs for each pixel."""

    @nn.compact
    def __call__(self, code: Float[Array, "b h w c"]) -> Float[Array, "b r r f"]:  # noqa: D102
        patch, width = PATCHES[self.config.downsampling], self.config.width
        x = self.blocks(self.dense(code, 2 * width))
        x = self.blocks(depth_to_space(self.dense(x, 4 * width), 2))
        if self.config.head == "patch":
            return depth_to_space(self.dense(self.normalized(x), self.features * patch**2), patch)
        if patch > HEAD_PATCH:
            x = depth_to_space(self.dense(self.normalized(x), width), patch // HEAD_PATCH)
        pending = Pending(GroupNorm()(x.shape[-1]), None)
        head = UpsampledConvolution(self.features, self.config, self.execution, hidden=False)
        return head(Features(x, pending))[0].raw


class AutoencoderKL(WholeCode, nn.Module):
    """See `models.api.Model`."""

    config: Config
    resolution: int
    likelihood: GaussianLikelihood
    execution: Execution = Execution()

    @property
    def image_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.resolution, self.resolution, CHANNELS

    @property
    def code_shape(self) -> tuple[int, ...]:  # noqa: D102
        side = self.resolution // self.config.downsampling
        return side, side, self.config.latent_channels

    def setup(self) -> None:  # noqa: D102
        self.encoder = Encoder(self.config, self.execution, 2 * self.config.latent_channels)
        self.decoder = Decoder(self.config, self.execution, self.likelihood.channels(CHANNELS))

    def __call__(  # noqa: D102
        self,
        images: Shaped[Array, "b r r 3"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Output:
        posterior = self.encode(images)
        code = posterior.sample(keys)
        return Output(self.decode(code), (LatentGroup(code, posterior),))

    def encode(self, images: Shaped[Array, "b r r 3"]) -> Gaussian:  # noqa: D102
        return Gaussian.bounded(*jnp.split(self.encoder(images), 2, axis=-1))

    def decode(  # noqa: D102
        self, code: Float[Array, "b h w c"], details: Float[Array, "b d"] | None = None
    ) -> Decoded:
        return self.likelihood.decode(self.decoder(code))


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> AutoencoderKL:
    """The network of a run."""
    return AutoencoderKL(config, resolution, likelihood, execution)
