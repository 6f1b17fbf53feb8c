"""A hierarchical VAE: many groups of latents, each with a prior that the groups above predict.

The network of Child 2021 ("Very Deep VAEs generalize autoregressive models"), with the options of Hazami et al. 2022
("Efficient-VDVAE"). Residual bottleneck blocks go from pixels up to one place and keep their last activations at each
resolution; blocks go back down, and each draws a group of latents from a posterior that sees those activations.

Blocks of one resolution are one `nn.scan` over stacked parameters, so the time to compile does not grow with the depth.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from facevae_jax.core import random
from facevae_jax.core.settings import CHANNELS, by_resolution, check, check_all
from facevae_jax.models.api import Execution, Gaussian, LatentGroup, Output, to_unit
from facevae_jax.models.blocks import by_channel
from facevae_jax.models.convolution import depth_to_space, space_to_depth
from facevae_jax.models.layers import Features, Pending, SameConvolution, UpsampledConvolution
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood

MAX_CODE = 16_384  # numbers of a code, where their covariance takes 1 GiB
_PART = re.compile(r"([1-9]\d{0,3})(?:([xdm])([1-9]\d{0,3}))?")
NO_NEIGHBORS = 2  # up to this resolution the blocks' convolutions are 1x1: there is nothing around a place
MIN_SOFTPLUS = (
    -40.0
)  # a deviation of e^-28, far below what `Gaussian.bounded` leaves; the logarithm of 0 has no gradient
HEAD_PATCH = 2  # by which the last layer doubles, where the network works on patches


class Level(NamedTuple):
    """Blocks of one resolution after each other."""

    resolution: int
    blocks: int
    factor: int = 0  # encoder: averages so many places into one after the last block; 0: does not
    above: int = 0  # decoder: adds the features of this coarser resolution before the first block; 0: does not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network. A run keeps these for life, but for `rematerialize`: they decide what the parameters mean."""

    kind: Literal["hierarchical"] = "hierarchical"
    # As published: 32x3 is three blocks at 32x32; 32d2 one that then halves; 32m16 one that first adds the features of
    # 16x16. Resolutions are those of the network: of patches, where `patch` is not 1.
    encoder_blocks: str = "32x2,32d2,16x2,16d2,8x2,8d2,4x2,4d4,1x2"
    decoder_blocks: str = "1x1,4m1,4x2,8m4,8x4,16m8,16x6,32m16,32x6"
    width: int = 128  # features of the blocks
    widths: str = ""  # of single resolutions, such as 64:96,32:192; none of a coarser one may be smaller
    bottleneck: float = 0.25  # width inside of a block, as a part of the width outside
    bottleneck_widths: str = ""  # widths inside of blocks of single resolutions, such as 64:32
    latent_channels: int = 16  # numbers of a group at each place
    patch: Literal[1, 2, 4] = 1  # side of the squares of pixels that the network works on
    activation: Literal["gelu", "silu"] = "gelu"
    # Of a standard deviation from what the network gives: exp(x), or softplus with beta = ln 2 (Hazami et al. 2022)
    deviation: Literal["exp", "softplus"] = "exp"
    bias_up_to: int = 64  # resolutions up to this have a learned array that the decoder begins with
    pixel_mean: float = 127.5  # taken from the pixels, 0 to 255, before they enter
    pixel_deviation: float = 63.75  # that they are divided by
    code_resolution: int = 4  # tools move the groups up to this resolution, and leave the finer ones to their priors
    rematerialize: bool = False  # computes each block again for its gradient, where memory is short
    # Of the computation; parameters and sums stay float32. auto: bfloat16 in training on a TPU or GPU, else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_all(self, "model", "width latent_channels pixel_deviation bottleneck", lambda x: x > 0, "positive")
        _ = self.encoder, self.decoder  # each checks its setting
        _ = self._inside
        narrow = min([self.width, *self._widths.values()]) * self.bottleneck
        check(narrow >= 1, "model.bottleneck", self.bottleneck, "at least 1 divided by the smallest width")

    def check_run(self, run: Any) -> None:
        """Raises a ValueError for settings of a `RunConfig` that this network cannot take."""
        side, at = run.data.resolution // self.patch, f"{run.data.resolution} / config.model.patch={self.patch}"
        check(self.decoder[-1].resolution == side, "model.decoder_blocks", self.decoder_blocks, f"end at {side} = {at}")
        seen = [side]
        for level in self.encoder:
            allowed = f"blocks from {side} = {at} down; {level.resolution}x cannot follow blocks that end at {seen[-1]}"
            check(level.resolution == seen[-1], "model.encoder_blocks", self.encoder_blocks, allowed)
            seen.append(level.resolution // max(level.factor, 1))
        resolutions, started = sorted(set(seen)), {self.decoder[0].resolution}
        of_encoder = f"at resolutions of the encoder, {', '.join(map(str, resolutions))}"
        for level in self.decoder:
            check(level.resolution in seen, "model.decoder_blocks", self.decoder_blocks, of_encoder)
            allowed = (
                f"such that {level.resolution}x begins with a part like {level.resolution}m1: nothing else reaches it"
            )
            joined = level.above > 0 or level.resolution in started
            check(joined, "model.decoder_blocks", self.decoder_blocks, allowed)
            started.add(level.resolution)
        check(set(self._widths) <= set(seen), "model.widths", self.widths, of_encoder)
        check(set(self._inside) <= set(seen), "model.bottleneck_widths", self.bottleneck_widths, of_encoder)
        widths = [self.width_of(resolution) for resolution in resolutions]
        check(widths == sorted(widths, reverse=True), "model.widths", self.widths, "no smaller at coarser resolutions")
        if self.patch > HEAD_PATCH:
            most = (self.patch // HEAD_PATCH) ** 2  # places that the head makes of one
            allowed = f"such that the width at {side} is a multiple of {most}, for model.patch={self.patch}"
            check(self.width_of(side) % most == 0, "model.widths", self.widths or self.width, allowed)
        size = sum(math.prod(shape) for shape in self.code_groups)
        allowed = f"such that the groups of the code have 1 to {MAX_CODE} numbers, not {size}"
        check(0 < size <= MAX_CODE, "model.code_resolution", self.code_resolution, allowed)

    @functools.cached_property
    def encoder(self) -> tuple[Level, ...]:
        """The levels, from pixels up."""
        return _levels(self.encoder_blocks, "model.encoder_blocks", joint="d")

    @functools.cached_property
    def decoder(self) -> tuple[Level, ...]:
        """The levels, from the top down."""
        return _levels(self.decoder_blocks, "model.decoder_blocks", joint="m")

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """The shape of each group of latents, from the top down."""
        return [
            (level.resolution, level.resolution, self.latent_channels)
            for level in self.decoder
            for _ in range(level.blocks)
        ]

    @property
    def code_groups(self) -> list[tuple[int, int, int]]:
        """The shapes of the groups of the code: the first ones."""
        count = next((i for i, shape in enumerate(self.groups) if shape[0] > self.code_resolution), len(self.groups))
        return self.groups[:count]

    def width_of(self, resolution: int) -> int:
        """Features at a resolution."""
        return self._widths.get(resolution, self.width)

    def inside(self, resolution: int) -> int:
        """Features inside of a block at a resolution."""
        return self._inside.get(resolution, int(self.width_of(resolution) * self.bottleneck))

    @functools.cached_property
    def _widths(self) -> dict[int, int]:
        return _whole_numbers(self.widths, "model.widths")

    @functools.cached_property
    def _inside(self) -> dict[int, int]:
        return _whole_numbers(self.bottleneck_widths, "model.bottleneck_widths")


def _whole_numbers(text: str, key: str) -> dict[int, int]:
    found = by_resolution(text, key, number=r"[1-9]\d{0,4}", example="64:96,32:192")
    return {resolution: int(number) for resolution, number in found.items()}


def _levels(text: str, key: str, *, joint: Literal["d", "m"]) -> tuple[Level, ...]:
    """The levels that the published notation means; `joint` is its letter for a change of resolution."""
    allowed = f"parts such as 32x3 and 32{joint}{2 if joint == 'd' else 16}, with commas between them"
    levels: list[Level] = []
    for part in text.split(","):
        found = _PART.fullmatch(part)
        check(found is not None and found[2] in (None, "x", joint), key, text, f"{allowed}, not {part!r}")
        assert found is not None
        resolution, number = int(found[1]), int(found[3] or 1)
        if found[2] == joint:
            possible = resolution % number == 0 and number > 1
            if joint == "m":
                there = {level.resolution for level in levels}
                possible = resolution % number == 0 and number < resolution and number in there
            check(possible, key, text, f"{allowed}; {part!r} cannot be at this place")
            levels.append(Level(resolution, 1, **{"factor" if joint == "d" else "above": number}))
        elif levels and levels[-1].resolution == resolution and not levels[-1].factor:
            levels[-1] = levels[-1]._replace(blocks=levels[-1].blocks + number)
        else:
            levels.append(Level(resolution, number))
    return tuple(levels)


def fan_in_uniform(blocks: int = 1) -> nn.initializers.Initializer:
    """Uniform in ±1 / sqrt(inputs), as PyTorch's convolutions begin, over sqrt(`blocks`)."""
    return nn.initializers.variance_scaling(1.0 / (3.0 * blocks), "fan_in", "uniform")


class Layer(NamedTuple):
    """What `models.layers` asks of a config, for one convolution."""

    kernel_size: int
    activation: str
    dtype: Literal["auto", "float32", "bfloat16"]
    normalization: str = "none"
    batch_norm_momentum: float = 0.0
    dropout_rate: float = 0.0


class Part(nn.Module):
    """Base of the network's parts."""

    config: Config
    execution: Execution

    def convolution(
        self,
        x: Float[Array, "b h w c"],
        features: int,
        *,
        name: str,
        kernel_size: int = 1,
        active: bool = True,
        initializer: nn.initializers.Initializer | None = None,
    ) -> Float[Array, "b h w f"]:
        """A convolution of the activation of `x`, or of `x` itself."""
        activation = {"gelu": "exact_gelu", "silu": "silu"}[self.config.activation]
        layer = Layer(kernel_size, activation, self.config.dtype)
        module = SameConvolution(
            features, layer, self.execution, initializer=initializer or fan_in_uniform(), name=name
        )
        return module(Features(x, Pending(None, None) if active else None))[0].raw

    def repeated(self, block: type[nn.Module], count: int, in_axes: Sequence[Any] = ()) -> Any:
        """`count` of a block after each other; `in_axes` are those of `nn.scan`, for its arguments after the first."""
        if self.config.rematerialize:
            block = nn.remat(block, prevent_cse=False)
        return nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=tuple(in_axes), length=count
        )


class Block(Part):
    """1x1, 3x3, 3x3, 1x1 convolutions, each of an activation; narrow between the first and the last."""

    resolution: int
    features: int
    initializer: nn.initializers.Initializer = fan_in_uniform()  # of the last convolution

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:  # noqa: D102
        inside = self.config.inside(self.resolution)
        kernel_size = 1 if self.resolution <= NO_NEIGHBORS else 3
        x = self.convolution(x, inside, name="c1")
        x = self.convolution(x, inside, name="c2", kernel_size=kernel_size)
        x = self.convolution(x, inside, name="c3", kernel_size=kernel_size)
        return self.convolution(x, self.features, name="c4", initializer=self.initializer).astype(jnp.float32)


class BottomUpBlock(Part):
    """x + block(x)."""

    resolution: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:  # noqa: D102
        initializer = fan_in_uniform(sum(level.blocks for level in self.config.encoder))
        return x + Block(self.config, self.execution, self.resolution, x.shape[-1], initializer)(x), None


class Encoder(Part):
    """Images to the features of each resolution."""

    @nn.compact
    def __call__(self, images: Shaped[Array, "b r r 3"]) -> dict[int, Float[Array, "b _ _ _"]]:  # noqa: D102
        config = self.config
        pixels = (255.0 * to_unit(images) - config.pixel_mean) / config.pixel_deviation
        x = space_to_depth(pixels, config.patch)
        x = self.convolution(x, config.width_of(x.shape[1]), name="in_conv", kernel_size=3, active=False)
        x = x.astype(jnp.float32)
        features = {x.shape[1]: x}
        for number, level in enumerate(config.encoder):
            blocks = self.repeated(BottomUpBlock, level.blocks)
            x, _ = blocks(config, self.execution, level.resolution, name=f"blocks_{number}")(x)
            if level.factor:
                x = nn.avg_pool(x, (level.factor, level.factor), (level.factor, level.factor))
                more = config.width_of(x.shape[1]) - x.shape[-1]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
            features[x.shape[1]] = x
        return features


class TopDownBlock(Part):
    """Draws a group of latents, and adds it to the features from above."""

    resolution: int

    def gaussian(self, mean: Float[Array, "b h w z"], deviation: Float[Array, "b h w z"]) -> Gaussian:
        """Of what a block gives."""
        if self.config.deviation == "softplus":  # with beta = ln 2: 1 at 0
            raised = jnp.maximum(deviation, MIN_SOFTPLUS) * math.log(2.0)
            deviation = jnp.log(jax.nn.softplus(raised) / math.log(2.0))
        return Gaussian.bounded(mean, 2.0 * deviation)

    @nn.compact
    def __call__(  # noqa: D102
        self,
        x: Float[Array, "b h w c"],
        seen: Float[Array, "b h w c"] | None,
        noise: Float[Array, "b h w z"],
    ) -> tuple[Float[Array, "b h w c"], LatentGroup]:
        config, width, channels = self.config, x.shape[-1], self.config.latent_channels
        block = functools.partial(Block, config, self.execution, self.resolution)
        blocks = len(config.groups)
        predicted = block(2 * channels + width, nn.initializers.zeros, name="prior")(x)
        *of_prior, more = jnp.split(predicted, [channels, 2 * channels], axis=-1)
        posterior = prior = self.gaussian(*of_prior)
        if seen is not None:
            of_posterior = block(2 * channels, name="posterior")(jnp.concatenate([x, seen], axis=-1))
            posterior = self.gaussian(*jnp.split(of_posterior, 2, axis=-1))
        x = x + more
        value = posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise
        x = x + self.convolution(value, width, name="z_proj", active=False, initializer=fan_in_uniform(blocks))
        x = x + block(width, fan_in_uniform(blocks), name="residual")(x)
        return x.astype(jnp.float32), LatentGroup(value, posterior, prior)


class Decoder(Part):
    """Groups of latents from the top down, and what the likelihood needs for each pixel."""

    features: int

    @nn.compact
    def __call__(
        self, seen: dict[int, Float[Array, "b _ _ _"]] | None, noise: Sequence[Float[Array, "b _ _ z"]]
    ) -> tuple[Float[Array, "b r r f"], list[LatentGroup]]:
        """Of the features of images, or None, and standard normal noise for each group."""
        config, batch = self.config, noise[0].shape[0]
        states: dict[int, Float[Array, "b _ _ _"]] = {}
        for resolution in sorted({level.resolution for level in config.decoder}):
            shape = (resolution, resolution, config.width_of(resolution))
            start = jnp.zeros(shape)
            if resolution <= config.bias_up_to:
                start = self.param(f"bias_{resolution}", nn.initializers.zeros, shape)
            states[resolution] = self.for_each_image(start, batch)
        drawn: list[LatentGroup] = []
        for number, level in enumerate(config.decoder):
            x = states[level.resolution]
            if level.above:
                factor, above = level.resolution // level.above, states[level.above][..., : x.shape[-1]]
                x = x + jnp.repeat(jnp.repeat(above, factor, axis=1), factor, axis=2)
            blocks = self.repeated(TopDownBlock, level.blocks, (nn.broadcast, 0))
            here = jnp.stack(noise[len(drawn) : len(drawn) + level.blocks])
            x, groups = blocks(config, self.execution, level.resolution, name=f"blocks_{number}")(
                x, None if seen is None else seen[level.resolution], here
            )
            drawn += [jax.tree.map(lambda leaf, at=at: leaf[at], groups) for at in range(level.blocks)]
            states[level.resolution] = x
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        x = x * by_channel(gain, x) + by_channel(self.param("bias", nn.initializers.zeros, (x.shape[-1],)), x)
        return self.head(x).astype(jnp.float32), drawn

    def for_each_image(self, values: Float[Array, "h w c"], batch: int) -> Float[Array, "b h w c"]:
        """The same values for all images of a batch."""
        if self.execution.form == "plain":
            return jnp.broadcast_to(values, (batch, *values.shape))
        # The gradient is a sum over the images. On a CPU a matrix product takes an eighth of the time of XLA's sum.
        return (jnp.ones((batch, 1)) @ values.reshape(1, -1)).reshape(batch, *values.shape)

    def head(self, x: Float[Array, "b h w c"]) -> Float[Array, "b r r f"]:
        """The last layer; for patches it doubles the resolution by neighbors, since single patches would show seams."""
        if self.config.patch == 1:
            return self.convolution(x, self.features, name="out_conv", active=False)
        x = depth_to_space(x, self.config.patch // HEAD_PATCH)
        layer = Layer(3, "silu", self.config.dtype)
        head = UpsampledConvolution(self.features, layer, self.execution, hidden=False, name="out_conv")
        return head(Features(x, Pending(None, None)))[0].raw


class HierarchicalVAE(nn.Module):
    """See `models.api.Model`.

    The code has the groups up to `config.code_resolution`, each measured in standard deviations of its prior from its
    prior's mean, so the prior of a code is N(0, I): that of the whole hierarchy, not of its first group alone.
    """

    config: Config
    resolution: int
    likelihood: GaussianLikelihood
    execution: Execution = Execution()

    @property
    def image_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.resolution, self.resolution, CHANNELS

    @property
    def code_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (sum(math.prod(shape) for shape in self.config.code_groups),)

    @property
    def detail_shapes(self) -> tuple[tuple[int, ...], ...]:  # noqa: D102
        return tuple(self.config.groups[len(self.config.code_groups) :])

    @property
    def activation_size(self) -> int:  # noqa: D102
        sides = {level.resolution for level in (*self.config.encoder, *self.config.decoder)}
        of_likelihood = self.resolution**2 * self.likelihood.channels(CHANNELS)
        return max(of_likelihood, *(side**2 * self.config.width_of(side) for side in sides))

    def setup(self) -> None:  # noqa: D102
        self.encoder = Encoder(self.config, self.execution)
        self.decoder = Decoder(self.config, self.execution, self.likelihood.channels(CHANNELS))

    def __call__(  # noqa: D102
        self,
        images: Shaped[Array, "b r r 3"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Output:
        raw, groups = self.decoder(self.encoder(images), self.noise(images.shape[0], keys))
        return Output(self.likelihood.decode(raw), tuple(groups))

    def noise(self, batch: int, keys: Key[Array, " b"] | None) -> list[Float[Array, "b _ _ z"]]:
        """Draws from N(0, I) for each group; zeros without keys."""
        if keys is None:
            return [jnp.zeros((batch, *shape)) for shape in self.config.groups]
        return [random.normal(random.substream(keys, number), shape) for number, shape in enumerate(self.config.groups)]

    def encode(self, images: Shaped[Array, "b r r 3"]) -> Gaussian:  # noqa: D102
        return _joined(self.relative_posteriors(images)[: len(self.config.code_groups)])

    def details(self, images: Shaped[Array, "b r r 3"]) -> Float[Array, "b d"]:  # noqa: D102
        below = self.relative_posteriors(images)[len(self.config.code_groups) :]
        return _joined(below).mean if below else jnp.zeros((images.shape[0], 0))

    def relative_posteriors(self, images: Shaped[Array, "b r r 3"]) -> list[Gaussian]:
        """Of each group, in standard deviations of its prior from its prior's mean, the groups above at their means."""
        _, groups = self.decoder(self.encoder(images), self.noise(images.shape[0], None))
        return [
            Gaussian((mean - prior.mean) * jnp.exp(-0.5 * prior.log_variance), log_variance - prior.log_variance)
            for _, (mean, log_variance), prior in groups
            if prior is not None
        ]

    def decode(  # noqa: D102
        self, code: Float[Array, "b z"], details: Float[Array, "b d"] | None = None
    ) -> Decoded:
        shapes = self.config.groups
        if details is None:
            size = sum(math.prod(shape) for shape in self.detail_shapes)
            details = jnp.zeros((code.shape[0], size))
        ends = [sum(math.prod(shape) for shape in shapes[:count]) for count in range(1, len(shapes))]
        parts = jnp.split(jnp.concatenate([code, details], axis=1), ends, axis=1)
        raw, _ = self.decoder(None, [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)])
        return self.likelihood.decode(raw)


def _joined(posteriors: Sequence[Gaussian]) -> Gaussian:
    """One of flat values from those of several groups."""
    fields = ([part.reshape(part.shape[0], -1) for part in parts] for parts in zip(*posteriors, strict=True))
    return Gaussian.bounded(*(jnp.concatenate(parts, axis=1) for parts in fields))


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> HierarchicalVAE:
    """The network of a run."""
    return HierarchicalVAE(config, resolution, likelihood, execution)
