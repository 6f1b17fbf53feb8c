"""`facevae_jax.load`: a trained model from a run's workdir or from an exported folder."""

import os
import pathlib

from facevae_jax.errors import UserError, expand_home
from facevae_jax.exporting import weights
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.training.restore import RestoredModel, restore_model


def load(path: str | os.PathLike[str], *, batch_size: int = 0) -> TrainedVAE:
    """The model of a run, from its best checkpoint, or one that was exported. No pickle is read.

    Args:
      path: the run's workdir, the exported folder, or its `model.safetensors` alone.
      batch_size: images that are computed at a time, at most; 0: what suits the resolution.

    Raises:
      UserError: there is no run, it has no checkpoint yet, or none can be read; or the file is damaged or foreign.
    """
    place = expand_home(path, name="--workdir")
    return TrainedVAE(restore(place), folder=folder_of(place), batch_size=batch_size)


def restore(place: pathlib.Path) -> RestoredModel:
    """What `load` puts on the devices.

    Raises:
      UserError: see `load`.
    """
    if not place.exists():
        raise UserError(f"--workdir={str(place)!r} does not exist: give a run's workdir, or an exported model.")
    return weights.read_model(place) if weights.is_exported(place) else restore_model(place)


def folder_of(place: pathlib.Path) -> pathlib.Path:
    """Where priors and latents of the model are kept.

    They are named by the step alone, so that two files in one folder would take each other's for their own: a file of
    another name than an exported folder's gets a folder of its own, and where that does not exist, nothing is kept.
    """
    if not place.is_file():
        return place
    return place.parent if place.name == weights.FILE else place.with_suffix("")
