"""Checkpoints: asynchronous, the latest two and the best one, and parameters alone for sampling."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from facevae_jax.errors import UserError, make_writable_directory
from facevae_jax.training.state import TrainState

DIRECTORY = "checkpoints"
LATEST_KEPT = 2
BEST_KEPT = 1
STATE = "state"


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether the workdir holds a finished checkpoint, without opening any."""
    return any(path.name.isdigit() for path in (workdir / DIRECTORY).glob("*"))


class Checkpoints:
    """The checkpoints of one workdir; use as a context manager, so that the last save is finished at the end."""

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False) -> None:
        """Opens the workdir's checkpoints.

        `max_to_keep` with `best_fn` would delete the newest steps, and resuming would lose work; the policy below
        keeps the latest whatever their score.

        Raises:
          UserError: the directory cannot be written to, or the scores of its checkpoints cannot be read.
        """
        directory = (workdir / DIRECTORY).absolute()
        if not read_only:  # Orbax finds out in a thread of its own, for which the others then wait ten minutes
            make_writable_directory(directory, name="--workdir's checkpoints")
        best = BestN(get_metric_fn=_loss, reverse=True, n=BEST_KEPT, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(LATEST_KEPT), best]),
            best_fn=_loss,
            best_mode="min",
            enable_async_checkpointing=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        handlers = {STATE: ocp.PyTreeCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        except ValueError as error:  # JSON that is none
            reason = " ".join(str(error).split())
            message = f"{directory}/*/metrics cannot be read ({reason}): move the damaged checkpoint away."
            raise UserError(message) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; the newest where none has a score."""
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def save(self, state: TrainState, *, step: int, loss: float | None) -> None:
        """Starts to save; returns when the arrays are copied. `loss` is the evaluation's, None where none was made."""
        if step in self._manager.all_steps():
            return  # Orbax would answer the same, silently
        tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        arguments = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree)})
        scored = loss is not None and math.isfinite(loss)  # Orbax would take NaN for the best
        self._manager.save(step, args=arguments, metrics={"loss": loss} if scored else None)

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """The whole state of a step, with the shapes and shardings of `abstract`."""
        tree = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(abstract)}
        return type(abstract)(**self.restore_tree(tree, step=step, partial=False))

    def restore_tree(self, abstract: dict[str, Any], *, step: int, partial: bool) -> dict[str, Any]:
        """Fields of a step's state: all of them, or with `partial` only those named in `abstract`.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
                abstract,
            ),
            partial_restore=partial,
        )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{STATE: arguments}))[STATE]
        except MemoryError:
            raise
        except Exception as error:  # what a damaged checkpoint raises depends on which of its files is damaged
            directory = pathlib.Path(self._manager.directory) / str(step)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            message = (
                f"{directory} cannot be restored ({reason}): if it is damaged, move it away to use the one before."
            )
            raise UserError(message) from error
