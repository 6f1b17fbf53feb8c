"""`facevae_jax.train`: the command `python -m facevae_jax.main` as a function."""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError, expand_home
from facevae_jax.data.arrays import GivenImages
from facevae_jax.data.dataset import ARRAYS
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training import loop


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    *,
    images: Any = None,
    validation_images: Any = None,
    accept_new_data: bool = False,
) -> TrainedModel:
    """Trains a model, like `python -m facevae_jax.main`, or resumes where an earlier call stopped.

        config = RunConfig(data=DataConfig(resolution=64, flip=True), train=TrainConfig(batch_size=16, epochs=200))
        model = facevae_jax.train(config, "/tmp/mine", images=faces)   # uint8 [N, 64, 64, 3]

    Args:
      config: of the run, such as `RunConfig(data=DataConfig(name="celeba", resolution=64))`.
      workdir: folder of the run, for checkpoints, pictures, metrics and `config.json`; made if missing.
      images: to train on instead of the dataset of `config.data.name`: an array, uint8 [N, R, R, 3] with R =
        `config.data.resolution`, or a sequence of images [R, R, 3], such as a PyTorch dataset, of whose tuples the
        first part is the image. They are copied into the workdir, where the commands find them. An index must give
        the same image whenever it is asked: leave random transforms to `config.data.flip`.
      validation_images: the same, to evaluate on; None: a tenth of `images`.
      accept_new_data: resume although the images are others than before.

    Returns:
      The model of the best checkpoint by validation loss.

    Raises:
      UserError: the config does not fit the data, the devices or an earlier run in `workdir`; training failed; or there
        are several processes, for which `python -m facevae_jax.main` is.
    """
    if not isinstance(config, RunConfig):
        raise UserError(
            f"config: a {type(config).__name__}: give a RunConfig, as RunConfig.from_config_dict makes one."
        )
    if jax.process_count() > 1:
        raise UserError("facevae_jax.train runs in one process: start python -m facevae_jax.main on each host.")
    given = None
    if images is None and validation_images is not None:
        raise UserError("validation_images: give images too.")
    if images is not None:
        given = GivenImages(images, validation_images, resolution=config.data.resolution)
        folder = expand_home(workdir, name="workdir").absolute() / loop.GIVEN_IMAGES
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=ARRAYS, data_dir=str(folder)))
    started = time.perf_counter()
    loop.train(config, pathlib.Path(workdir), images=given, accept_new_data=accept_new_data)
    model = load(workdir)
    model.keep_artifacts(training_seconds=time.perf_counter() - started)
    return model
