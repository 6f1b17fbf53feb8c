"""`facevae_jax.train`: the command `python -m facevae_jax.main` as a function."""

import os
import pathlib

import jax

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training import loop


def train(config: RunConfig, workdir: str | os.PathLike[str], *, accept_new_data: bool = False) -> TrainedModel:
    """Trains a model, like `python -m facevae_jax.main`, or resumes where an earlier call stopped.

    Args:
      config: of the run, such as `RunConfig(data=DataConfig(name="celeba", resolution=64))`.
      workdir: folder of the run, for checkpoints, pictures, metrics and `config.json`; made if missing.
      accept_new_data: resume although the dataset was prepared anew with other images.

    Returns:
      The model of the best checkpoint by validation loss.

    Raises:
      UserError: the config does not fit the data, the devices or an earlier run in `workdir`; training failed; or there
        are several processes, for which `python -m facevae_jax.main` is.
    """
    if jax.process_count() > 1:
        raise UserError("facevae_jax.train runs in one process: start python -m facevae_jax.main on each host.")
    loop.train(config, pathlib.Path(workdir), accept_new_data=accept_new_data)
    model = load(workdir)
    model.keep_moments()
    return model
