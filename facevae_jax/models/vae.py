"""The variational autoencoder: strided convolutions to a Gaussian posterior, transposed ones back to pixels.

With filters 32, 64, 64, 64, batch normalization, LeakyReLU 0.3 and dropout 0.25 at 128x128 it is the network of Foster,
*Generative Deep Learning* (1st edition, chapter 3), which the preset `gdl128` reproduces.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from facevae_jax.core.settings import BELOW_ONE, CHANNELS, check, check_all
from facevae_jax.models.api import Execution, Gaussian, LatentGroup, Output, WholeCode
from facevae_jax.models.layers import (
    Features,
    Stage,
    StridedConvolution,
    TransposedConvolution,
    UpsampledConvolution,
    layer_keys,
)
from facevae_jax.models.likelihoods import LIKELIHOODS, Decoded, GaussianLikelihood

MAX_LATENT_DIM = 16_384  # where the covariance of the latents takes 1 GiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network. A run keeps these for life: they decide which parameters exist and what they mean."""

    kind: Literal["vae", "autoencoder"] = "vae"  # autoencoder: the same network without a KL divergence or draws
    latent_dim: int = 200
    stages: int = 0  # halvings of the resolution; 0: one per entry of `filters`, else down to a 4x4 grid
    filters: tuple[int, ...] = ()  # of each encoder stage, mirrored in the decoder; empty: doubling from base_filters
    base_filters: int = 32  # filters of the first stage where `filters` is empty
    max_filters: int = 256  # where the doubling stops
    kernel_size: Literal[3, 4, 5] = 3  # side of every convolution, of stride 2
    # How the last layer doubles the resolution. transposed: as the paper, with a fine checkerboard over every face
    head: Literal["nearest", "transposed"] = "nearest"
    normalization: Literal["batch", "group", "none"] = "batch"
    batch_norm_momentum: float = 0.9  # of the running statistics; 0.99, Keras' value, lags hundreds of steps behind
    activation: Literal["leaky_relu", "relu", "silu", "gelu"] = "leaky_relu"  # slope 0.3 for leaky_relu, as in Keras
    dropout_rate: float = 0.0  # fraction of activations dropped after each hidden stage
    # Of the computation; parameters and sums stay float32. auto: bfloat16 in training on a TPU or GPU, else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    EARLIER: ClassVar[dict[str, Any]] = {"head": "transposed"}  # where a saved config lacks the setting

    def __post_init__(self) -> None:
        in_range = 0 < self.latent_dim <= MAX_LATENT_DIM
        check(in_range, "model.latent_dim", self.latent_dim, f"positive and at most {MAX_LATENT_DIM}")
        check(self.stages >= 0, "model.stages", self.stages, "0 (automatic) or positive")
        check(all(f > 0 for f in self.filters), "model.filters", self.filters, "positive numbers")
        if self.filters and self.stages:
            allowed = f"0 or the number of config.model.filters, {len(self.filters)}"
            check(self.stages == len(self.filters), "model.stages", self.stages, allowed)
        check(self.base_filters > 0, "model.base_filters", self.base_filters, "positive")
        allowed = f"at least config.model.base_filters={self.base_filters}"
        check(self.max_filters >= self.base_filters, "model.max_filters", self.max_filters, allowed)
        check_all(self, "model", "batch_norm_momentum dropout_rate", lambda x: 0 <= x < 1, BELOW_ONE)

    def check_run(self, run: Any) -> None:
        """Raises a ValueError for settings of a `RunConfig` that this network cannot take."""
        self.stage_filters(run.data.resolution)
        if self.kind != "vae":
            refuse_rate(self.kind, run)

    def stage_filters(self, resolution: int) -> tuple[int, ...]:
        """Filters of each encoder stage for images of `resolution` pixels.

        Raises:
          ValueError: the stages would leave less than a 2x2 grid.
        """
        limit = int(math.log2(resolution)) - 1
        stages = len(self.filters) or self.stages or limit - 1
        key, value = ("model.filters", self.filters) if self.filters else ("model.stages", self.stages)
        check(stages <= limit, key, value, f"at most {limit} stages at config.data.resolution={resolution}")
        return self.filters or tuple(min(self.base_filters * 2**i, self.max_filters) for i in range(stages))


def refuse_rate(kind: str, run: Any) -> None:
    """Raises a ValueError for settings of the KL divergence, or of a draw, that a model without either cannot take."""
    objective = run.objective
    discrete = LIKELIHOODS[objective.likelihood].discrete
    check(not discrete, "objective.likelihood", objective.likelihood, f"a density for {kind}, which has no ELBO")
    for key, allowed in {"kl_weight": (1.0, 0.0), "kl_warmup_steps": (0,), "free_bits": (0.0,)}.items():
        value = getattr(objective, key)
        check(value in allowed, f"objective.{key}", value, f"{allowed[0]:g}: {kind} has no KL divergence")


class Encoder(nn.Module):
    """Images to the posterior: uint8 pixels, which the first convolution scales as it reads them, or [0, 1]."""

    config: Config
    execution: Execution

    @nn.compact
    def __call__(  # noqa: D102
        self,
        images: Shaped[Array, "b h w c"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Gaussian:
        config, x = self.config, Features(images, weights=weights)
        for layer, filters in enumerate(config.stage_filters(images.shape[1])):
            y = StridedConvolution(filters, config, self.execution)(x)
            x = Stage(config, self.execution)(y, layer_keys(keys, layer), train=train)
        dtype = self.execution.dtype_of(config.dtype)
        flat = x.value(config).astype(dtype).reshape(images.shape[0], -1)
        names = ("mean",) if config.kind == "autoencoder" else ("mean", "log_variance")
        heads = [Head(config.latent_dim, name=name)(flat.shape[1]) for name in names]

        def project(kernel: Array, bias: Array) -> Array:
            return flat @ kernel.astype(dtype) + bias.astype(dtype)[None]

        if self.execution.few_launches:  # one product instead of two, with three gradients instead of six
            joined = (jnp.concatenate(parts, axis=-1) for parts in zip(*heads, strict=True))
            mean, *log_variance = jnp.split(project(*joined), len(heads), axis=1)
        else:
            mean, *log_variance = (project(*head) for head in heads)
        if not log_variance:
            return Gaussian.point(mean.astype(jnp.float32))
        return Gaussian.bounded(mean, *log_variance)


class Head(nn.Module):
    """The parameters of `nn.Dense`."""

    features: int

    @nn.compact
    def __call__(self, size: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:  # noqa: D102
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (size, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class Decoder(nn.Module):
    """Codes to the likelihood of images."""

    config: Config
    resolution: int
    likelihood: GaussianLikelihood
    execution: Execution

    @nn.compact
    def __call__(  # noqa: D102
        self,
        code: Float[Array, "b z"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Decoded:
        config, dtype = self.config, self.execution.dtype_of(self.config.dtype)
        *hidden, deepest = config.stage_filters(self.resolution)
        grid = self.resolution >> (len(hidden) + 1)
        dense = nn.Dense(grid * grid * deepest, dtype=dtype, kernel_init=nn.initializers.glorot_uniform())
        x = Features(dense(code.astype(dtype)).reshape(-1, grid, grid, deepest), weights=weights)
        for layer, filters in enumerate(reversed(hidden)):
            y = TransposedConvolution(filters, config, self.execution)(x)
            x = Stage(config, self.execution)(y, layer_keys(keys, layer), train=train)
        channels = self.likelihood.channels(CHANNELS)
        head = UpsampledConvolution if config.head == "nearest" else TransposedConvolution
        later = train and self.execution.few_passes and self.likelihood.means_are_sigmoids
        last, _ = head(channels, config, self.execution, hidden=False, adds_bias=not later)(x)
        if last.bias is not None:
            return self.likelihood.decode_with_bias(last.raw, last.bias)
        return self.likelihood.decode(last.raw.astype(jnp.float32))


class VAE(WholeCode, nn.Module):
    """Encoder, a draw from the posterior, decoder; see `models.api.Model`."""

    config: Config
    resolution: int
    likelihood: GaussianLikelihood
    execution: Execution = Execution()

    @property
    def image_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.resolution, self.resolution, CHANNELS

    @property
    def code_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.config.latent_dim,)

    def setup(self) -> None:  # noqa: D102
        self.encoder = Encoder(self.config, self.execution)
        self.decoder = Decoder(self.config, self.resolution, self.likelihood, self.execution)

    def __call__(  # noqa: D102
        self,
        images: Shaped[Array, "b h w c"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Output:
        latent, encoder, decoder = (layer_keys(keys, number) for number in range(3))
        posterior = self.encoder(images, encoder, train=train, weights=weights)
        if self.config.kind == "autoencoder":
            return Output(self.decoder(posterior.mean, decoder, train=train, weights=weights), ())
        code = posterior.sample(latent)
        decoded = self.decoder(code, decoder, train=train, weights=weights)
        return Output(decoded, (LatentGroup(code, posterior),))

    def encode(self, images: Shaped[Array, "b h w c"]) -> Gaussian:  # noqa: D102
        return self.encoder(images, None, train=False)

    def decode(  # noqa: D102
        self, code: Float[Array, "b z"], details: Float[Array, "b d"] | None = None
    ) -> Decoded:
        return self.decoder(code, None, train=False)


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> VAE:
    """The network of a run."""
    return VAE(config, resolution, likelihood, execution)
