"""What a step needs beside arrays, made from a config; and the arrays that training changes."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from facevae_jax import models
from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.core.random import named_key
from facevae_jax.core.settings import CHANNELS
from facevae_jax.models.api import Execution, Model, image_keys
from facevae_jax.models.blocks import BLOCK_BYTES, CORE_BLOCK_BYTES
from facevae_jax.models.convolution import choose_form
from facevae_jax.models.likelihoods import GaussianLikelihood, make_likelihood
from facevae_jax.training.optimizer import make_optimizer

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis over all devices, or those given.

    Auto, not the default Explicit, which linen's Dropout cannot trace under.

    Raises:
      UserError: JAX cannot start on the platform that the environment names.
    """
    try:
        count = jax.device_count() if devices is None else len(devices)
    except (AssertionError, RuntimeError) as error:  # the first without a word, where a platform has no plugin
        variable = "JAX_PLATFORM_NAME" if os.environ.get("JAX_PLATFORM_NAME") else "JAX_PLATFORMS"
        platforms = os.environ.get(variable, "")
        reason = " ".join(str(error).split()).partition(" (")[0] or "is it installed?"
        raise UserError(f"{variable}={platforms!r}: no device can be used ({reason}): unset it, or cpu.") from error
    return jax.make_mesh((count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform_of(mesh: Mesh | AbstractMesh) -> str | None:
    """cpu, gpu or tpu; None of a mesh without devices."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_along(mesh: Mesh | AbstractMesh, axis: int) -> NamedSharding:
    """Cut along the array's dimension `axis`, one part a device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))


def on_each_device(
    function: Callable[[Any, Any], Any], mesh: Mesh | AbstractMesh, *, axis: int
) -> Callable[[Any, Any], Any]:
    """`function` of (a replicated tree, a tree), which each device runs on its part of the second along `axis`.

    Its result must be the same on all devices. What they exchange is written in it; nothing else is sent.
    """
    cut = PartitionSpec(*[None] * axis, DATA_AXIS)
    # Without the check a psum's gradient is a psum, on which batch normalization relies.
    whole = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=(whole, cut), out_specs=whole, check_vma=False)


class RunningMean(NamedTuple):
    """Exponential mean of a number over training steps: `total` / `weight`, unbiased by its start at 0."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """1 before the first step."""
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1e-30), 1.0)

    def add(self, value: Float[Array, ""], *, momentum: float) -> "RunningMean":
        """With one more."""
        return RunningMean(momentum * self.total + (1 - momentum) * value, momentum * self.weight + (1 - momentum))


class TrainState(NamedTuple):
    """Everything that a checkpoint holds: arrays only, so that it is saved, sharded and donated as one tree."""

    step: Int[Array, ""]  # optimizer steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    averaged: Any  # exponential moving averages of {"params", "batch_stats"}; None without ema_decay
    decoder_variance: RunningMean
    gradient_norm: RunningMean | None = None  # None without skip_factor

    @property
    def evaluation_variables(self) -> dict[str, Any]:
        """The variables to evaluate and sample with: the averaged ones where they are kept."""
        return {"params": self.params, "batch_stats": self.batch_stats} if self.averaged is None else self.averaged


class TrainSetup(NamedTuple):
    """Config, model, likelihood, optimizer and mesh of a run; made once and passed on."""

    config: RunConfig
    model: Model
    likelihood: GaussianLikelihood
    optimizer: optax.GradientTransformation
    mesh: Mesh | AbstractMesh  # abstract where only shapes are asked for
    execution: Execution  # the model's

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh | AbstractMesh, *, total_steps: int = 1) -> "TrainSetup":
        """The setup of a run; `total_steps` shapes the learning rate's schedule."""
        platform = platform_of(mesh)
        execution = Execution(
            choose_form(config.train.convolution, platform),
            DATA_AXIS,
            block_bytes=BLOCK_BYTES if mesh.size == 1 else CORE_BLOCK_BYTES,
            dtype="bfloat16" if platform in ("tpu", "gpu") else "float32",
            few_launches=platform == "gpu",
            few_passes=platform == "tpu",
        )
        model, likelihood = make_model(config, execution)
        optimizer = make_optimizer(config.train, total_steps=total_steps)
        return cls(config, model, likelihood, optimizer, mesh, execution)


def make_model(config: RunConfig, execution: Execution | None = None) -> tuple[Model, GaussianLikelihood]:
    """The model of a run and its likelihood.

    Args:
      config: of the run.
      execution: how the model is computed; None: on whole batches, with convolutions in the form for this platform.
    """
    side = config.data.resolution
    likelihood = make_likelihood(config.objective, (side, side, CHANNELS))
    execution = execution or Execution(choose_form(config.train.convolution))
    module = models.module_of(config.model.kind)
    model = module.build(config.model, resolution=side, likelihood=likelihood, execution=execution)
    if missing := [name for name in ("detail_shapes", "activation_size") if not hasattr(model, name)]:
        kind = f"config.model.kind={config.model.kind}"
        raise UserError(f"{kind}: its class needs {missing[0]}, or the base models.api.WholeCode.")
    return model, likelihood


def initial_state(setup: TrainSetup) -> TrainState:
    """The state at step 0; to be traced."""
    images, keys = jnp.zeros((1, *setup.model.image_shape)), image_keys(jax.random.key(0), 1)
    key = named_key(setup.config.train.seed, "initialise")
    variables = setup.model.init({"params": key}, images, keys, train=False)
    params = dict(variables["params"]) | setup.likelihood.initial_params()
    batch_stats = variables.get("batch_stats", {})
    start_of_averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=setup.optimizer.init(params),
        averaged=start_of_averages if setup.config.train.ema_decay else None,
        decoder_variance=RunningMean(jnp.zeros(()), jnp.zeros(())),
        gradient_norm=RunningMean(jnp.zeros(()), jnp.zeros(())) if setup.config.train.skip_factor else None,
    )


def abstract_state(setup: TrainSetup) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array being made."""
    shapes, whole = jax.eval_shape(functools.partial(initial_state, setup)), replicated(setup.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)


def create_state(setup: TrainSetup) -> TrainState:
    """The state at step 0, made by one compiled call where it will live."""
    return jax.jit(functools.partial(initial_state, setup), out_shardings=replicated(setup.mesh))()


def parameter_count(state: TrainState) -> int:
    """Numbers in the parameters and the batch statistics, as Keras' `summary` counts them."""
    return sum(leaf.size for leaf in jax.tree.leaves((state.params, state.batch_stats)))
