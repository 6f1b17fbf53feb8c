"""`model.safetensors`: all that a trained model is, in one file that is read without a pickle.

Tensors are named by their paths, such as `params/encoder/StridedConvolution_0/kernel`, in the layout of Flax (HWIO
kernels). The file's metadata hold the config, the step and a checksum, so that the file is enough by itself.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import AbstractMesh
from jaxtyping import Shaped

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError, some
from facevae_jax.core.files import reason
from facevae_jax.core.settings import flatten
from facevae_jax.latents.moments import Moments
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import DATA_AXIS, TrainSetup, abstract_state
from facevae_jax.training.workdir import CONFIG_FILE, differences, read_config

FILE = "model.safetensors"
FORMAT = "facevae_jax"
VERSION = 2  # of names, layouts and metadata; a reader refuses newer ones
DATA_KEYS = "data."  # keys of the config that decide where the data are, not what the model is
FIXED_DATA_KEY = "data.resolution"
CHECKSUM = "sha256"
MOMENTS = "latent_moments"  # of the codes of the training split; in version 1, of the evaluation split


def serialize(restored: Restored) -> bytes:
    """The file's content."""
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in _named(tree_of(restored)).items()}
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


def read_model(path: pathlib.Path) -> Restored:
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
        raise UserError(f"{path} cannot be read ({reason(error)}): it is damaged, or no safetensors file.") from error
    config, step = _read_metadata(path, metadata)
    tree = _abstract_tree(config)
    _check_tensors(path, tensors, _named(tree))
    if metadata.get(CHECKSUM) != _digest(metadata, tensors):
        raise UserError(f"{path} is damaged: its checksum is not that of its content; export or copy it again.")
    if folder and (folder / CONFIG_FILE).exists():
        config = _with_data_of(config, read_config(folder), folder / CONFIG_FILE)
    tree = jax.tree.unflatten(jax.tree.structure(tree), [tensors[name] for name in _named(tree)])
    moments, variance = tree.pop(MOMENTS), tree.pop("decoder_variance")
    kept = Moments(moments["mean"], moments["covariance"], int(moments["images"]))
    return Restored(config, tree, variance, step, kept if kept.images else None)


def tree_of(restored: Restored) -> dict[str, Any]:
    """Every array of the file."""
    moments = restored.moments
    if moments is None:
        raise ValueError("a model is exported with its moments")
    arrays = {name: np.asarray(value, np.float32) for name, value in moments._asdict().items()}
    return {**restored.variables, MOMENTS: arrays, "decoder_variance": restored.decoder_variance}


def _abstract_tree(config: RunConfig) -> dict[str, Any]:
    """Shapes and dtypes of what a model with this config consists of."""
    setup = TrainSetup.of(config, AbstractMesh((1,), (DATA_AXIS,)))
    state, size = abstract_state(setup), math.prod(setup.model.code_shape)
    shapes = {"mean": (size,), "covariance": (size, size), "images": ()}
    moments = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {**state.evaluation_variables, MOMENTS: moments, "decoder_variance": state.decoder_variance}


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
        return RunConfig.from_saved(json.loads(metadata["config"])), int(metadata["step"])
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
