"""A trained model for use: its parameters alone, without the optimiser's state."""

import pathlib
import sys
from typing import Any, NamedTuple

import jax

from facevae_jax.config import RunConfig
from facevae_jax.errors import UserError
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.models.vae import VAE
from facevae_jax.training.checkpoints import DIRECTORY, Checkpoints, DamagedError
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import DecoderVariance, abstract_state, make_model, make_optimizer
from facevae_jax.training.workdir import read_config


def _first_whole(checkpoints: Checkpoints, wanted: dict[str, Any], steps: list[int]) -> tuple[dict[str, Any], int]:
    """Fields of the first of `steps` that is whole, and which it is."""
    for number, step in enumerate(steps, start=1):
        try:
            return checkpoints.restore_tree(wanted, step=step, partial=True), step
        except DamagedError as error:
            if number == len(steps):
                raise
            print(f"warning: {error}; the next best is taken", file=sys.stderr)
    raise AssertionError("no steps")


class RestoredModel(NamedTuple):
    """What sampling and editing need."""

    config: RunConfig
    model: VAE
    variables: Any  # averaged parameters where the run kept them
    latent_moments: LatentMoments
    decoder_variance: DecoderVariance  # its running mean; see `training.step.evaluation_variance`
    step: int


def restore_model(workdir: pathlib.Path) -> RestoredModel:
    """The model of the run in `workdir`, from its best checkpoint by validation loss; a damaged one is passed over.

    Raises:
      UserError: no run, no checkpoint, or one that cannot be read.
    """
    config = read_config(workdir)
    if not (workdir / DIRECTORY).is_dir():
        raise UserError(f"--workdir={str(workdir)!r} has no checkpoint yet: train first, or wait for its first one.")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"--workdir={str(workdir)!r} has no checkpoint yet: wait for the run's first one.")
        model = make_model(config)
        state = abstract_state(config, model, make_optimizer(config.train, total_steps=1), make_mesh())
        names = ("params", "batch_stats") if state.averaged is None else ("averaged",)
        wanted = {name: getattr(state, name) for name in (*names, "latent_moments", "decoder_variance")}
        restored, step = _first_whole(checkpoints, wanted, sorted(steps, key=lambda s: s != checkpoints.best_step()))
    variables = restored["averaged"] if "averaged" in names else {name: restored[name] for name in names}
    return RestoredModel(
        config,
        model,
        jax.block_until_ready(variables),
        restored["latent_moments"],
        restored["decoder_variance"],
        step,
    )
