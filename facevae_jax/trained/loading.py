"""`facevae_jax.load`: a trained model from a run's workdir or from an exported folder."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from facevae_jax.core import numerics
from facevae_jax.core.errors import UserError, expand_home
from facevae_jax.trained import weights
from facevae_jax.trained.model import Restored, TrainedModel
from facevae_jax.training import recovery
from facevae_jax.training.checkpoints import Checkpoints, DamagedError, steps_in
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from facevae_jax.training.workdir import read_config


def load(path: str | os.PathLike[str], *, batch_size: int = 0) -> TrainedModel:
    """The model of a run, from its best checkpoint, or one that was exported. No pickle is read.

    Args:
      path: the run's workdir, the exported folder, or its `model.safetensors` alone.
      batch_size: images that are computed at a time, at most; 0: what suits the resolution.

    Raises:
      UserError: there is no run, it has no checkpoint yet, or none can be read; or the file is damaged or foreign.
    """
    place = expand_home(path, name="--workdir")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 0:
        raise UserError(f"--batch_size={batch_size!r}: choose a whole number, or 0.")
    numerics.check()
    mesh = make_mesh()
    return TrainedModel(restore(place, mesh), folder=folder_of(place), mesh=mesh, batch_size=batch_size)


def restore(place: pathlib.Path, mesh: Mesh) -> Restored:
    """What `load` puts on the devices of the mesh.

    Raises:
      UserError: see `load`.
    """
    if not place.exists():
        raise UserError(f"--workdir={str(place)!r} does not exist: give a run's workdir, or an exported model.")
    return weights.read_model(place) if weights.is_exported(place) else restore_run(place, mesh)


def restore_run(workdir: pathlib.Path, mesh: Mesh) -> Restored:
    """The best checkpoint of a run by validation loss; a damaged one is passed over.

    Raises:
      UserError: no run, no checkpoint, or none that can be read.
    """
    config = read_config(workdir)
    recovery.check_name(workdir)
    if not steps_in(workdir):
        raise UserError(f"--workdir={str(workdir)!r} has no checkpoint yet: train first, or wait for its first one.")
    recovery.complete(workdir)
    with _without_warnings(), Checkpoints(workdir, read_only=True) as checkpoints:
        state = abstract_state(TrainSetup.of(config, mesh))
        names = ("params", "batch_stats") if state.averaged is None else ("averaged",)
        wanted = {name: getattr(state, name) for name in (*names, "decoder_variance")}
        restored, step = _first_whole(
            checkpoints, wanted, sorted(checkpoints.steps(), key=lambda s: s != checkpoints.best_step())
        )
    variables = restored["averaged"] if "averaged" in names else {name: restored[name] for name in names}
    return Restored(config, jax.block_until_ready(variables), restored["decoder_variance"], step)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences what Orbax logs about reading without writing."""
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_whole(checkpoints: Checkpoints, wanted: dict[str, Any], steps: list[int]) -> tuple[dict[str, Any], int]:
    """Fields of the first of `steps` that is whole, and which it is."""
    *others, last = steps
    for step in others:
        checkpoints.check(wanted, step=step)
        try:
            return checkpoints.restore_tree(wanted, step=step), step
        except DamagedError as error:
            print(f"warning: {error}; the next best is used", file=sys.stderr)
    checkpoints.check(wanted, step=last)
    return checkpoints.restore_tree(wanted, step=last), last


def folder_of(place: pathlib.Path) -> pathlib.Path:
    """Where artifacts of the model are kept: the folder, or of a single file that was renamed, one of its name."""
    if not place.is_file():
        return place
    return place.parent if place.name == weights.FILE else place.with_suffix("")
