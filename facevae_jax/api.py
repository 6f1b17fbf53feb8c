"""The public functions that do what a command does, for use from Python as `facevae_jax.NAME`."""

import os
import pathlib

import jax

from facevae_jax.config import DataConfig, RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.prepared.builder import Policy
from facevae_jax.prepare import prepare as _prepare
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training import loop


def prepare(
    source: str | os.PathLike[str],
    *,
    layout: str,
    resolution: int,
    name: str | None = None,
    data_dir: str | os.PathLike[str] = DataConfig.data_dir,
    attributes: str | os.PathLike[str] | None = None,
    on_bad_image: Policy = "error",
    overwrite: bool = False,
    workers: int | None = None,
    beam_options: str | None = None,
) -> pathlib.Path:
    """Makes a dataset from images, like `python -m facevae_jax.prepare`, and prints what it did.

    An interrupted call resumes where it stopped when it is made again; a finished one returns at once.

    Args:
      source: the folder or .zip file of the images; for the layout `tfds` the name of the dataset.
      layout: what the source looks like: `ffhq`, `celeba`, `folder` or `tfds`.
      resolution: R, pixels along one side: a power of two from 32 to 1024. Images are stored as uint8 [R, R, 3].
      name: of the dataset, for `config.data.name`; that of the layout or of the TFDS dataset by default.
      data_dir: the folder of all prepared datasets, for `config.data.data_dir`.
      attributes: a CSV or JSON file of labels, joined by file name; for `ffhq` also the ffhq-features-dataset.
      on_bad_image: what to do with images that cannot be read: `error` writes no dataset, `skip` leaves them out and
        lists them in the dataset's bad_images.jsonl.
      overwrite: replace a dataset that exists already.
      workers: threads that convert images; one more than there are CPU cores by default.
      beam_options: convert by Apache Beam with these options instead of threads; "" for Beam's defaults.

    Returns:
      The folder of the dataset.

    Raises:
      UserError: an argument is impossible, the images are not what the layout expects, or they cannot be used; the
        message names arguments by their flags, such as --layout.
    """
    return _prepare(
        layout=layout,
        source=os.fspath(source),
        resolution=resolution,
        data_dir=os.fspath(data_dir),
        name=name,
        workers=workers,
        on_bad_image=on_bad_image,
        overwrite=overwrite,
        attributes=None if attributes is None else os.fspath(attributes),
        beam_options=beam_options,
    )


def train(config: RunConfig, workdir: str | os.PathLike[str]) -> TrainedModel:
    """Trains a model, like `python -m facevae_jax.main`, or resumes where an earlier call stopped.

    Args:
      config: of the run, such as `RunConfig(data=DataConfig(name="celeba", resolution=64))`.
      workdir: folder of the run, for checkpoints, pictures, metrics and `config.json`; made if missing.

    Returns:
      The model of the best checkpoint by validation loss.

    Raises:
      UserError: the config does not fit the data, the devices or an earlier run in `workdir`; training failed; or there
        are several processes, for which `python -m facevae_jax.main` is.
    """
    if jax.process_count() > 1:
        raise UserError("facevae_jax.train runs in one process: start python -m facevae_jax.main on each host.")
    loop.train(config, pathlib.Path(workdir))
    model = load(workdir)
    model.keep_moments()
    return model
