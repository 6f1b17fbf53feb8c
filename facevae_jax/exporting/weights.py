"""`model.safetensors`: all that a trained model is, in one file that is read without a pickle.

Tensors are named by their paths, such as `params/encoder/StridedConvolution_0/kernel`, in the layout of Flax (HWIO
kernels). The file's metadata hold the config, the step and a checksum, so that the file is enough by itself.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from facevae_jax.config import RunConfig, flatten
from facevae_jax.errors import UserError, some
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.sharding import make_mesh, replicated
from facevae_jax.training.state import abstract_state, make_model, make_optimizer
from facevae_jax.training.workdir import CONFIG_FILE, differences, read_config

FILE = "model.safetensors"
FORMAT = "facevae_jax"
VERSION = 1  # of names, layouts and metadata; a reader refuses newer ones
DATA_KEYS = "data."  # keys of the config that decide where the data are, not what the model is
FIXED_DATA_KEY = "data.resolution"
CHECKSUM = "sha256"


def serialize(restored: RestoredModel) -> bytes:
    """The file's content."""
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in _named(_tree(restored)).items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "config": json.dumps(restored.config.to_dict(), allow_nan=False),
        "step": str(restored.step),
        "averaged": json.dumps(is_averaged(restored.config)),
    }
    return safetensors.numpy.save(tensors, metadata | {CHECKSUM: _digest(metadata, tensors)})


def is_averaged(config: RunConfig) -> bool:
    """Whether a run kept averaged parameters, which are then the ones that are exported."""
    return config.train.ema_decay > 0


def is_exported(path: pathlib.Path) -> bool:
    """Whether `path` is to be read by `read_model`: a file, or a folder that holds one and is no run."""
    return path.is_file() or ((path / FILE).exists() and not (path / "checkpoints").exists())


def read_model(path: pathlib.Path) -> RestoredModel:
    """The model in an exported folder, or in its `model.safetensors` alone.

    Of a folder's `config.json` the section `data` is taken, which may have been changed to where the data are now.

    Raises:
      UserError: there is no such file; it is damaged, foreign, of a newer version or not what its config describes.
    """
    folder = path if path.is_dir() else None
    path = path / FILE if folder else path
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): it is damaged, or no safetensors file.") from error
    config, step = _read_metadata(path, metadata)
    tree = _abstract_tree(config)
    _check_tensors(path, tensors, _named(tree))
    if metadata.get(CHECKSUM) != _digest(metadata, tensors):
        raise UserError(f"{path} is damaged: its checksum is not that of its content; export or copy it again.")
    if folder and (folder / CONFIG_FILE).exists():
        config = _with_data_of(config, read_config(folder), folder / CONFIG_FILE)
    leaves = jax.device_put([tensors[name] for name in _named(tree)], replicated(make_mesh()))
    tree = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    moments, variance = tree.pop("latent_moments"), tree.pop("decoder_variance")
    return RestoredModel(config, make_model(config), tree, moments, variance, step)


def _tree(restored: RestoredModel) -> dict[str, Any]:
    return {
        **restored.variables,
        "latent_moments": restored.latent_moments,
        "decoder_variance": restored.decoder_variance,
    }


def _abstract_tree(config: RunConfig) -> dict[str, Any]:
    """Shapes and dtypes of what a model with this config consists of."""
    optimizer = make_optimizer(config.train, total_steps=1)
    state = abstract_state(config, make_model(config), optimizer, make_mesh())
    return {
        **state.evaluation_variables,
        "latent_moments": state.latent_moments,
        "decoder_variance": state.decoder_variance,
    }


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _digest(metadata: dict[str, str], tensors: dict[str, Shaped[np.ndarray, "..."]]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and values, whatever their order in the file."""
    found = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != CHECKSUM}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()


def _check_format(path: pathlib.Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by facevae_jax.export: its metadata do not say so.")
    version = metadata.get("format_version", "")
    if not version.isdecimal():
        raise UserError(f"{path} is damaged: its format version is {version!r}.")
    if int(version) > VERSION:
        raise UserError(f"{path} has format version {version}, and this facevae_jax reads {VERSION}: upgrade it.")


def _read_metadata(path: pathlib.Path, metadata: dict[str, str]) -> tuple[RunConfig, int]:
    """The config and the step."""
    try:
        return RunConfig.from_config_dict(json.loads(metadata["config"])), int(metadata["step"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error}): was it written by another version?") from error


def _check_tensors(path: pathlib.Path, found: dict[str, np.ndarray], wanted: dict[str, Any]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{path} lacks {len(missing)} of the model's {len(wanted)} tensors: {some(missing)}.")
    if foreign := [name for name in found if name not in wanted]:
        raise UserError(f"{path} has {len(foreign)} tensors that its config does not describe: {some(foreign)}.")
    for name, leaf in wanted.items():
        tensor = found[name]
        if (tensor.shape, tensor.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(
                f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, where its config describes "
                f"{leaf.dtype}{list(leaf.shape)}."
            )


def _with_data_of(config: RunConfig, given: RunConfig, path: pathlib.Path) -> RunConfig:
    """The model's config with the section `data` of a `config.json`.

    Raises:
      UserError: something else differs, that would change the model or be ignored.
    """
    changed = differences(flatten(config.to_dict()), flatten(given.to_dict()))
    for key, (old, new) in changed.items():
        if not key.startswith(DATA_KEYS) or key == FIXED_DATA_KEY:
            raise UserError(f"{path}: {key} is {new!r} where {FILE} has {old!r}; only where the data are may change.")
    return dataclasses.replace(config, data=given.data)
