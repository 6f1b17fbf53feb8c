"""Published weights of other projects as parameters of this one's models."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jaxtyping import Float32

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import reason
from facevae_jax.latents.moments import Moments
from facevae_jax.models.hierarchical import Config
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import DATA_AXIS, RunningMean, TrainSetup, abstract_state

PARTS = {"posterior": "enc", "prior": "prior", "residual": "resnet"}  # of a block of the decoder
SHAPES: dict[str, Any] = {"is_leaf": lambda node: isinstance(node, tuple)}  # of a tree of shapes
Tensors = Mapping[str, Float32[np.ndarray, "..."]]


def read_torch(path: pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
    """The tensors of a PyTorch checkpoint, read without unpickling objects.

    Raises:
      UserError: torch is missing, or the file cannot be read or holds more than tensors.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError('--from=vdvae needs torch: pip install "facevae-jax[torch]".') from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"--checkpoint={str(path)!r} cannot be read: {reason(error)}.") from error
    except Exception as error:  # UnpicklingError of torch's own reader, whose class is of the module pickle
        text = reason(error)[:200]
        raise UserError(f"--checkpoint={str(path)!r} is no file of PyTorch tensors alone: {text}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--checkpoint={str(path)!r} is not the state of a network: it holds more than tensors alone.")
    return {name.removeprefix("module."): tensor.detach().float().numpy() for name, tensor in state.items()}


def restored_from(tensors: Tensors, candidates: Mapping[str, RunConfig]) -> tuple[str, Restored]:
    """The model that some tensors are, and the name of its config: the first of `candidates` that they fit.

    Nothing is known of the codes of the images that it was trained on, so their moments are those of the prior.

    Raises:
      UserError: they fit none; it says where the last one differs.
    """
    why = ""
    for name, config in candidates.items():
        if not isinstance(config.model, Config):
            raise UserError(f"{name} is of kind {config.model.kind}: it must be hierarchical.")
        setup = TrainSetup.of(config, AbstractMesh((1,), (DATA_AXIS,)))
        wanted = jax.tree.map(np.shape, abstract_state(setup).params)
        try:
            params = vdvae_parameters(tensors, config.model)
            if (found := jax.tree.map(np.shape, params)) != wanted:
                pairs = zip(jax.tree.leaves_with_path(wanted, **SHAPES), jax.tree.leaves(found, **SHAPES), strict=True)
                path, shape, other = next((path, shape, other) for (path, shape), other in pairs if shape != other)
                raise ValueError(f"{jax.tree_util.keystr(path)} is {other}, not {shape}")
        except KeyError as error:
            why = f"{name}: there is no tensor {error}"
            continue
        except (IndexError, ValueError) as error:
            why = f"{name}: {error}"
            continue
        size = math.prod(setup.model.code_shape)
        moments = Moments(np.zeros(size), np.eye(size), 1)
        zero = jnp.zeros(())
        return name, Restored(config, {"params": params, "batch_stats": {}}, RunningMean(zero, zero), 0, moments)
    raise UserError(
        f"the checkpoint fits no network ({why}): give --config=vdvae_ffhq256 with the settings of the model."
    )


def vdvae_parameters(tensors: Tensors, config: Config) -> dict[str, Any]:
    """Parameters of `models.hierarchical` from the state of the network of Child 2021.

    Raises:
      KeyError: a tensor is missing.
      ValueError: tensors are left over.
    """
    left = dict(tensors)

    def layers(names: list[str]) -> dict[str, Any]:
        """The convolution of each block, stacked."""
        kernels = [left.pop(f"{name}.weight").transpose(2, 3, 1, 0) for name in names]
        return {"kernel": np.stack(kernels), "bias": np.stack([left.pop(f"{name}.bias") for name in names])}

    def layer(name: str) -> dict[str, Any]:
        return {kind: values[0] for kind, values in layers([name]).items()}

    def block(names: list[str]) -> dict[str, Any]:
        return {f"c{number}": layers([f"{name}.c{number}" for name in names]) for number in range(1, 5)}

    encoder: dict[str, Any] = {"in_conv": layer("encoder.in_conv")}
    for number, names in enumerate(_numbered("encoder.enc_blocks", [level.blocks for level in config.encoder])):
        encoder[f"blocks_{number}"] = {"Block_0": block(names)}
    decoder: dict[str, Any] = {"out_conv": layer("decoder.out_net.out_conv")}
    for number, names in enumerate(_numbered("decoder.dec_blocks", [level.blocks for level in config.decoder])):
        parts = {ours: block([f"{name}.{theirs}" for name in names]) for ours, theirs in PARTS.items()}
        decoder[f"blocks_{number}"] = parts | {"z_proj": layers([f"{name}.z_proj" for name in names])}
    resolutions = sorted({level.resolution for level in config.decoder if level.resolution <= config.bias_up_to})
    for number, resolution in enumerate(resolutions):
        decoder[f"bias_{resolution}"] = left.pop(f"decoder.bias_xs.{number}")[0].transpose(1, 2, 0)
    for name in ("gain", "bias"):
        decoder[name] = left.pop(f"decoder.{name}").reshape(-1)
    if left:
        raise ValueError(f"{len(left)} tensors are left over, such as {min(left)}")
    return {"encoder": encoder, "decoder": decoder}


def _numbered(prefix: str, counts: list[int]) -> list[list[str]]:
    """Names of the blocks of each level."""
    ends = np.cumsum(counts)
    return [[f"{prefix}.{at}" for at in range(end - count, end)] for count, end in zip(counts, ends, strict=True)]
