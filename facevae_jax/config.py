"""Every setting of a run: frozen dataclasses with units, defaults and checks.

A `ConfigDict` exists only between the command line and `RunConfig.from_config_dict`; everything inside takes these
dataclasses. An unknown key is a TypeError, an impossible value a ValueError; both name the key as it is typed on the
command line, the value and what is allowed. The settings of a model stand in the model's own file (`models.KINDS`).
"""

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from facevae_jax import models
from facevae_jax.core.settings import (
    BELOW_ONE,
    MAX_SEED,
    build,
    by_resolution,
    check,
    check_all,
    check_known,
    check_section,
    defaults,
    flatten,
)
from facevae_jax.core.settings_help import describe

MIN_RESOLUTION = 32
MAX_RESOLUTION = 1024
_WEIGHT = r"\d{1,6}(?:\.\d{1,6})?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which faces, at which size, and how they reach the device."""

    name: str = "synthetic"  # `synthetic` (drawn by the project) or the name of a prepared dataset: celeba, ...
    data_dir: str = "~/tensorflow_datasets"  # where prepared datasets and pixel stores are; may be gs:// or s3://
    cache_dir: str = "~/.cache/facevae_jax/datasets"  # where datasets of a remote data_dir are kept on this machine
    resolution: int = 64  # pixels along one side; a power of two from 32 to 1024
    # resident: each device holds the split; sharded: a slice of it; streamed: batches come from the memory-mapped store
    feed: Literal["auto", "resident", "sharded", "streamed"] = "auto"
    flip: bool = False  # each image is mirrored left to right with probability 1/2 each time that it is trained on
    dequantize: bool = False  # uniform noise of one gray level on the targets, so that bits/dim are a valid bound
    synthetic_train_images: int = 8192
    synthetic_validation_images: int = 1024

    def __post_init__(self) -> None:
        check_all(self, "data", "data_dir cache_dir", bool, "a directory")
        check(bool(self.name), "data.name", self.name, "`synthetic` or the name of a prepared dataset")
        power_of_two = self.resolution > 0 and self.resolution & (self.resolution - 1) == 0
        allowed = f"a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"
        in_range = MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION
        check(power_of_two and in_range, "data.resolution", self.resolution, allowed)
        counts = "synthetic_train_images synthetic_validation_images"
        check_all(self, "data", counts, lambda x: x > 0, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss: decoder likelihood plus weighted KL divergence."""

    # mse: r_loss_factor x mean squared error (the paper); discretized_logistic: a probability of the 8-bit values, and
    # color_logistic one that lets green depend on red, and blue on both
    likelihood: str = "mse"  # a name in models.likelihoods.LIKELIHOODS
    mixture_components: int = 1  # of discretized_logistic and color_logistic
    bits: int = 8  # of each pixel value, the highest, that those two score; published figures for FFHQ-256 have 5
    variance: Literal["optimal", "learned"] = "optimal"  # of the gaussian likelihood (Rybkin et al. 2021)
    r_loss_factor: float = 10_000.0  # weight of the mean squared error over H, W, C; `mse` only
    kl_weight: float = 1.0  # beta
    # Factors on it for the groups of latents from a resolution on, such as 8:2,32:10; a larger one lowers their rate
    kl_weights: str = ""
    kl_warmup_steps: int = 0  # the KL weight grows linearly from 0 over so many steps
    free_bits: float = 0.0  # nats of each dimension, or group, that cost nothing (Kingma et al. 2016, eq. 15)
    free_bits_per: Literal["dimension", "group"] = "dimension"  # what has so many; a hierarchy has many groups

    def __post_init__(self) -> None:
        check(1 <= self.bits <= 8, "objective.bits", self.bits, "from 1 to 8")
        check(self.mixture_components > 0, "objective.mixture_components", self.mixture_components, "positive")
        check(self.r_loss_factor > 0, "objective.r_loss_factor", self.r_loss_factor, "positive")
        check_all(self, "objective", "kl_weight kl_warmup_steps free_bits", lambda x: x >= 0, "0 or positive")
        _ = self.kl_weights_by_resolution

    @functools.cached_property
    def kl_weights_by_resolution(self) -> dict[int, float]:
        """`kl_weights`, by the resolution that each begins to hold at."""
        found = by_resolution(self.kl_weights, "objective.kl_weights", number=_WEIGHT, example="8:2,32:10")
        return {resolution: float(weight) for resolution, weight in found.items()}

    def kl_weight_at(self, resolution: int) -> float:
        """What `kl_weights` say of the groups of a resolution; 1 above the first of them."""
        found = [at for at in self.kl_weights_by_resolution if at <= resolution]
        return self.kl_weights_by_resolution[max(found)] if found else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization, logging and evaluation intervals, and how a batch is split."""

    seed: int = 0
    batch_size: int = 128  # images in the global batch, over all devices
    accumulation: int = 1  # parts that a batch is computed in, one after another, where it needs too much memory
    epochs: int = 30
    steps: int = 0  # optimizer steps; 0: as many as `epochs` make
    learning_rate: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to zero at the last step
    warmup_steps: int = 100  # linear growth of the learning rate from 0: Adam's first steps are all full steps
    optimizer: Literal["adam", "adamw", "adamax"] = "adam"
    beta1: float = 0.9  # of the running mean of gradients
    beta2: float = 0.999  # of that of their squares; of their running maximum, for adamax
    weight_decay: float = 0.0  # of adamw: taken from parameters at each step, times the learning rate
    clip_norm: float = 0.0  # the gradient's global L2 norm is clipped to this; 0: never
    skip_factor: float = 0.0  # an update is skipped where that norm is above this times its running mean; 0: never
    ema_decay: float = 0.0  # of averaged parameters, which evaluation and sampling then use; 0: none are kept
    log_every_steps: int = 50
    evaluate_every_epochs: int = 1  # validation, pictures and a checkpoint; always after the last step too
    checkpoint_every_steps: int = 0  # between evaluations; 0: only at evaluations
    max_skipped_steps: int = 20  # in a row whose loss or gradient was not finite, after which the run stops
    watchdog_seconds: int = 600  # without a finished dispatch, after which the run ends; 0: never
    steps_per_dispatch: int = 64  # at most; fewer where one dispatch would last longer than about 3 s
    convolution: Literal["auto", "plain", "matmul"] = "auto"  # auto: matmul on CPU, plain elsewhere
    tensorboard: bool = False  # curves and pictures in the workdir; needs the extra `tensorboard`
    wandb: bool = False  # the same at Weights & Biases; needs the extra `wandb`

    def __post_init__(self) -> None:
        check(0 <= self.seed <= MAX_SEED, "train.seed", self.seed, "from 0 to 2**32 - 1")
        positive = "batch_size accumulation epochs learning_rate log_every_steps evaluate_every_epochs"
        check_all(self, "train", positive, lambda x: x > 0, "positive")
        check_all(self, "train", "max_skipped_steps steps_per_dispatch", lambda x: x > 0, "positive")
        not_negative = "steps warmup_steps clip_norm weight_decay checkpoint_every_steps watchdog_seconds"
        check_all(self, "train", not_negative, lambda x: x >= 0, "0 or positive")
        check_all(self, "train", "ema_decay beta1 beta2", lambda x: 0 <= x < 1, BELOW_ONE)
        factor = self.skip_factor
        check(factor == 0 or factor > 1, "train.skip_factor", factor, "0 (never) or above 1")
        decay = self.weight_decay
        check(decay == 0 or self.optimizer == "adamw", "train.weight_decay", decay, "0 but for the optimizer adamw")
        allowed = f"a divisor of config.train.batch_size={self.batch_size}"
        check(self.batch_size % self.accumulation == 0, "train.accumulation", self.accumulation, allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run."""

    data: DataConfig = DataConfig()
    model: models.Config = dataclasses.field(default_factory=lambda: models.config_class(models.DEFAULT)())
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        from facevae_jax.models.likelihoods import LIKELIHOODS  # imports jax, which reading data does not need

        name = self.objective.likelihood
        check(name in LIKELIHOODS, "objective.likelihood", name, f"one of {', '.join(LIKELIHOODS)}")
        LIKELIHOODS[name].check_run(self)
        self.model.check_run(self)
        sides = sorted({shape[0] for shape in getattr(self.model, "groups", [])})
        known = (
            f"at resolutions of the model's groups: {', '.join(map(str, sides))}"
            if sides
            else "empty: it has no groups"
        )
        weights = self.objective.kl_weights_by_resolution
        check(set(weights) <= set(sides), "objective.kl_weights", self.objective.kl_weights, known)

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """The locked ConfigDict that `configs/*.py` return and the command line overrides."""
        return ml_collections.ConfigDict(dataclasses.asdict(self)).lock()

    @classmethod
    def from_config_dict(
        cls, config: Mapping[str, Any] | ml_collections.ConfigDict, typed: Collection[str] = ()
    ) -> "RunConfig":
        """Checks and freezes what the command line (or a `config.json`) gave.

        Args:
          config: of a config file, with the command line's overrides.
          typed: the settings that the command line overrode, such as `model.kind`.

        Raises:
          TypeError: an unknown key, or a value of the wrong type.
          ValueError: an impossible value.
        """
        check_section(config, "")
        sections = {"data": DataConfig, "model": None, "objective": ObjectiveConfig, "train": TrainConfig}
        check_known(config, sections, "")
        built: dict[str, Any] = {
            key: build(sections[key], config[key], prefix=f"{key}.")
            if sections[key]
            else _build_model(config[key], typed)
            for key in config
        }
        return cls(**built)

    @classmethod
    def from_saved(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Of `to_dict`, perhaps by an older version: a setting that it did not have is what it always did.

        Raises:
          TypeError: an unknown key, or a value of the wrong type.
          ValueError: an impossible value.
        """
        check_section(config, "")
        model = config.get("model", {})
        check_section(model, "model.")
        kind = model.get("kind", models.DEFAULT)
        earlier = getattr(models.config_class(kind), "EARLIER", {}) if kind in models.KINDS else {}
        return cls.from_config_dict({**config, "model": {**earlier, **model}})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as written to `config.json`."""
        return dataclasses.asdict(self)


def _build_model(values: Any, typed: Collection[str]) -> models.Config:
    """The settings of the kind that `values` name.

    Where the command line changed the kind, the file's settings of its own kind that the new one lacks are left out.
    Where somebody set one, it is refused. A `config.json` of an older version may hold defaults of another kind.
    """
    check_section(values, "model.")
    kind = values.get("kind", models.DEFAULT)
    check(kind in models.KINDS, "model.kind", kind, f"one of {', '.join(models.KINDS)}")
    cls = models.config_class(kind)
    known = {field.name for field in dataclasses.fields(cls)}
    others = [defaults(models.config_class(other)) for other in models.KINDS]
    left = {}
    for key, value in values.items():
        if key in known or not any(key in other for other in others):
            left[key] = value
        elif "model.kind" not in typed or f"model.{key}" in typed:
            value = tuple(value) if isinstance(value, list) else value
            same = any(key in other and other[key] == value for other in others)
            check(same, f"model.{key}", value, f"left out: {kind} has no such setting")
    return build(cls, left, prefix="model.")


def describe_settings() -> str:
    """Every setting with its default and its meaning, for --help."""
    lines = ["Settings, with the defaults of configs that do not say otherwise:", ""]
    for section, cls in {"data": DataConfig, "objective": ObjectiveConfig, "train": TrainConfig}.items():
        lines += [*describe(section, cls), ""]
    kinds: dict[Any, list[str]] = {}
    for kind in models.KINDS:
        kinds.setdefault(models.config_class(kind), []).append(kind)
    for cls, names in kinds.items():
        lines += [f"of config.model.kind {' or '.join(names)}:", *describe("model", cls), ""]
    return "\n".join(lines)


def check_overrides(arguments: Sequence[str]) -> None:
    """Raises a TypeError if one of the command line's `--config.x.y=value` names no setting."""
    settings = RunConfig().to_dict()
    for kind in models.KINDS:
        settings["model"] = settings["model"] | defaults(models.config_class(kind))
    known = sorted(flatten(settings, "config."))
    for argument in arguments:
        key = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and "=(" in argument and sum(a.startswith(f"--{key}=") for a in arguments) > 1:
            raise TypeError(f"--{key} is given twice, and lists would be joined: leave one.")
        if argument.startswith("-") and key.startswith("config.") and key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
            raise TypeError(f"--{key} is unknown: did you mean {', '.join('--' + name for name in near)}?")
