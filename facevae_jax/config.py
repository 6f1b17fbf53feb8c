"""Every knob of a run: frozen dataclasses with units, defaults and validation.

A `ConfigDict` exists only between the command line and `RunConfig.from_config_dict`; everything inside takes these
dataclasses. An unknown key is a TypeError, an impossible value a ValueError; both name the key as it is typed on the
command line, the value, and what is allowed.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ml_collections

MIN_RESOLUTION = 32
MAX_RESOLUTION = 1024
CHANNELS = 3
MAX_LATENT_DIM = 16_384  # where the covariance of the latents takes 1 GiB
BELOW_ONE = "at least 0 and below 1"


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a ValueError that names the key, the value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"config.{key}={value!r} is not possible: it must be {allowed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which faces, at which size, and how they reach the device."""

    name: str = "synthetic"  # `synthetic` (drawn by the project) or the name of a prepared dataset: celeba, ffhq, ...
    data_dir: str = "~/tensorflow_datasets"  # where prepared datasets and pixel stores are; may be gs:// or s3://
    cache_dir: str = "~/.cache/facevae_jax/datasets"  # where datasets of a remote data_dir are kept on this machine
    resolution: int = 64  # pixels along one side; a power of two from 32 to 1024
    # resident: each device holds the split; sharded: a slice of it; streamed: batches come from the memory-mapped store
    feed: Literal["auto", "resident", "sharded", "streamed"] = "auto"
    flip: bool = False  # each image is mirrored left to right with probability 1/2 each time that it is trained on
    dequantize: bool = False  # uniform noise of one grey level on the targets, so that bits/dim are a valid bound
    synthetic_train_images: int = 8192
    synthetic_validation_images: int = 1024

    def __post_init__(self) -> None:
        check(bool(self.data_dir), "data.data_dir", self.data_dir, "a directory")
        check(bool(self.cache_dir), "data.cache_dir", self.cache_dir, "a directory")
        check(bool(self.name), "data.name", self.name, "`synthetic` or the name of a prepared dataset")
        power_of_two = self.resolution > 0 and self.resolution & (self.resolution - 1) == 0
        allowed = f"a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"
        in_range = MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION
        check(power_of_two and in_range, "data.resolution", self.resolution, allowed)
        check(self.synthetic_train_images > 0, "data.synthetic_train_images", self.synthetic_train_images, "positive")
        validation_images = self.synthetic_validation_images
        check(validation_images > 0, "data.synthetic_validation_images", validation_images, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. A run keeps these for life: they decide which parameters exist and what they mean."""

    # autoencoder: the same network without a KL divergence or draws; pca: principal components of the pixels
    kind: Literal["vae", "autoencoder", "pca"] = "vae"
    latent_dim: int = 200
    stages: int = 0  # halvings of the resolution; 0: one per entry of `filters`, else down to a 4x4 grid
    filters: tuple[int, ...] = ()  # of each encoder stage, mirrored in the decoder; empty: doubling from base_filters
    base_filters: int = 32  # filters of the first stage where `filters` is empty
    max_filters: int = 256  # where the doubling stops
    kernel_size: Literal[3, 4, 5] = 3  # side of every convolution, of stride 2
    normalization: Literal["batch", "group", "none"] = "batch"
    batch_norm_momentum: float = 0.9  # of the running statistics; 0.99, Keras' value, lags hundreds of steps behind
    activation: Literal["leaky_relu", "relu", "silu", "gelu"] = "leaky_relu"  # slope 0.3 for leaky_relu, as in Keras
    dropout_rate: float = 0.0  # fraction of activations dropped after each hidden stage
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and sums stay float32

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
        check(0 <= self.batch_norm_momentum < 1, "model.batch_norm_momentum", self.batch_norm_momentum, BELOW_ONE)
        check(0 <= self.dropout_rate < 1, "model.dropout_rate", self.dropout_rate, BELOW_ONE)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss: decoder likelihood plus weighted KL divergence."""

    # mse: r_loss_factor x mean squared error (the paper); discretized_logistic: a probability of the 8-bit values
    likelihood: Literal["mse", "gaussian", "discretized_logistic"] = "mse"
    mixture_components: int = 1  # of discretized_logistic
    variance: Literal["optimal", "learned"] = "optimal"  # of the gaussian likelihood (Rybkin et al. 2021)
    r_loss_factor: float = 10_000.0  # weight of the mean squared error over H, W, C; `mse` only
    kl_weight: float = 1.0  # beta
    kl_warmup_steps: int = 0  # the KL weight grows linearly from 0 over so many steps
    free_bits: float = 0.0  # nats per latent dimension that cost nothing (Kingma et al. 2016, eq. 15)

    def __post_init__(self) -> None:
        components = self.mixture_components
        check(components > 0, "objective.mixture_components", components, "positive")
        only = "1, unless config.objective.likelihood is discretized_logistic"
        check(components == 1 or self.is_discrete, "objective.mixture_components", components, only)
        check(self.r_loss_factor > 0, "objective.r_loss_factor", self.r_loss_factor, "positive")
        check(self.kl_weight >= 0, "objective.kl_weight", self.kl_weight, "0 or positive")
        check(self.kl_warmup_steps >= 0, "objective.kl_warmup_steps", self.kl_warmup_steps, "0 or positive")
        check(self.free_bits >= 0, "objective.free_bits", self.free_bits, "0 or positive, in nats")

    @property
    def is_discrete(self) -> bool:
        """Whether the likelihood is a probability of 8-bit values, not a density."""
        return self.likelihood == "discretized_logistic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, cadence and the way the work is cut up."""

    seed: int = 0
    batch_size: int = 128  # images in the global batch, over all devices
    accumulation: int = 1  # parts that a batch is computed in, one after another, where it needs too much memory
    epochs: int = 30
    steps: int = 0  # optimiser steps; 0: as many as `epochs` make
    learning_rate: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to zero at the last step
    warmup_steps: int = 100  # linear growth of the learning rate from 0: Adam's first steps are all full steps
    clip_norm: float = 0.0  # the gradient's global L2 norm is clipped to this; 0: never
    ema_decay: float = 0.0  # of averaged parameters, which evaluation and sampling then use; 0: none are kept
    log_every_steps: int = 50
    evaluate_every_epochs: int = 1  # validation, pictures and a checkpoint; always after the last step too
    checkpoint_every_steps: int = 0  # between evaluations; 0: only at evaluations
    max_skipped_steps: int = 20  # in a row whose loss or gradient was not finite, after which the run stops
    watchdog_seconds: int = 600  # without a finished dispatch, after which the run ends; 0: never
    steps_per_dispatch: int = 64  # at most; fewer where one dispatch would last longer than about 3 s
    convolution: Literal["auto", "plain", "matmul"] = "auto"  # auto: matmul on CPU, plain elsewhere
    tensorboard: bool = False  # needs the extra `tensorboard`

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, "train.seed", self.seed, "from 0 to 2**32 - 1")
        for key in ("batch_size", "accumulation", "epochs", "learning_rate", "log_every_steps"):
            check(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "positive")
        for key in ("evaluate_every_epochs", "max_skipped_steps", "steps_per_dispatch"):
            check(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "positive")
        for key in ("steps", "warmup_steps", "clip_norm", "checkpoint_every_steps", "watchdog_seconds"):
            check(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or positive")
        check(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, BELOW_ONE)
        allowed = f"a divisor of config.train.batch_size={self.batch_size}"
        check(self.batch_size % self.accumulation == 0, "train.accumulation", self.accumulation, allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        self.model.stage_filters(self.data.resolution)
        needs = "False where config.objective.likelihood is discretized_logistic, whose pixels are whole numbers"
        check(not (self.data.dequantize and self.objective.is_discrete), "data.dequantize", True, needs)
        if self.objective.is_discrete:
            kind, needs = self.model.kind, "vae where config.objective.likelihood is discretized_logistic"
            check(kind == "vae", "model.kind", kind, needs)
        # What a baseline has not, it cannot be asked for.
        if self.model.kind != "vae":
            object.__setattr__(self, "objective", dataclasses.replace(self.objective, kl_weight=0.0))
        if self.model.kind == "pca":
            object.__setattr__(self, "objective", dataclasses.replace(self.objective, likelihood="mse"))
            object.__setattr__(self, "train", dataclasses.replace(self.train, steps=1, ema_decay=0.0))

    @property
    def components(self) -> int:
        """Of the mixture that the decoder gives for each pixel; 0: it gives a mean alone."""
        return self.objective.mixture_components if self.objective.is_discrete else 0

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """The locked ConfigDict that `configs/*.py` return and the command line overrides."""
        return ml_collections.ConfigDict(dataclasses.asdict(self)).lock()

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Checks and freezes what the command line (or a `config.json`) gave.

        Raises:
          TypeError: an unknown key, or a value of the wrong type.
          ValueError: an impossible value.
        """
        return _build(cls, config, prefix="")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as written to `config.json`."""
        return dataclasses.asdict(self)


def check_overrides(arguments: Sequence[str]) -> None:
    """Raises a TypeError if one of the command line's `--config.x.y=value` names no setting."""
    known = sorted(flatten(RunConfig().to_dict(), "config."))
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and key.startswith("config.") and key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
            raise TypeError(f"--{key} is unknown: did you mean {', '.join('--' + name for name in near)}?")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"name": "x"}} -> {"data.name": "x"}, with tuples as lists as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(cls: Any, values: Mapping[str, Any], *, prefix: str) -> Any:
    if not hasattr(values, "items"):  # a ConfigDict is no Mapping; a file that failed to load raises its error here
        key, given = f"config.{prefix}".rstrip("."), type(values).__name__
        raise TypeError(f"{key} is of type {given}: it must be a ConfigDict, as .to_config_dict() makes it.")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise TypeError(f"config.{prefix}{unknown[0]} is unknown: config.{prefix}* has {', '.join(hints)}.")
    built = {}
    for key, value in values.items():
        hint, path = hints[key], prefix + key
        if dataclasses.is_dataclass(hint):
            built[key] = _build(hint, value, prefix=f"{path}.")
        else:
            built[key] = _coerce(value, hint, path)
    return cls(**built)


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type that `hint` asks for; nothing is rounded or parsed."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        check(value in allowed, path, value, "one of " + ", ".join(map(str, allowed)))
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value,)
        if not isinstance(value, (tuple, list)) or not all(type(item) is int for item in value):
            raise TypeError(f"config.{path}={value!r} must be whole numbers such as (32, 64).")
        return tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise TypeError(f"config.{path}={value!r} must be of type {hint.__name__}.")
    if hint is float:
        check(math.isfinite(value), path, value, "finite")
    if hint is int:  # steps and sizes are int32 on the device
        check(abs(value) < 2**31 or path == "train.seed", path, value, "below 2**31")
    return value
