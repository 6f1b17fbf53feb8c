"""Checkpoints: asynchronous, the latest two and the best one, and parameters alone for sampling."""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from facevae_jax.core import hosts
from facevae_jax.core.errors import FULL, UserError, make_writable_directory
from facevae_jax.training.checksums import checksums, is_finite
from facevae_jax.training.setup import TrainState
from facevae_jax.training.telemetry import log

DIRECTORY = "checkpoints"
DAMAGED = "damaged_checkpoints"
LATEST_KEPT = 2
BEST_KEPT = 1
STATE = "state"
# JSON: checksums of the state's fields, whether they and the score are finite, and whether the evaluation was finished
RECORD = "record"


WEIGHTS = ("params", "batch_stats", "averaged")  # fields of the state that have a model's parameters
# What TensorStore and the system say where nothing is wrong with a file.
OF_MACHINE = re.compile(
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|Permission denied|Too many open files|"
    "Stale file handle"
)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def steps_in(workdir: pathlib.Path) -> list[int]:
    """Steps that have a finished checkpoint in a workdir, without opening any."""
    try:
        entries = list(os.scandir(workdir / DIRECTORY))  # pathlib's glob finds nothing where it may not look
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())


def _check_readable(directory: pathlib.Path) -> None:
    """Raises a UserError for a part of a checkpoint that this user may not read: it is not damaged."""
    for folder, folders, files in os.walk(directory):
        for path in (pathlib.Path(folder, name) for name in [*folders, *files]):
            needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
            if path.exists() and not os.access(path, needed):
                raise UserError(f"{path} may not be read: give yourself the right to read it.")


class Restored(NamedTuple):
    """What a run resumes from."""

    state: TrainState
    evaluated: bool  # False where the evaluation of its step was cut short


class DamagedError(UserError):
    """A checkpoint that cannot be restored, does not hold what was saved, or holds numbers that are not finite."""


class Checkpoints:
    """The checkpoints of one workdir; use as a context manager, so that the last save is finished at the end."""

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False, forget_scores: bool = False) -> None:
        """Opens the workdir's checkpoints; damaged scores are set aside, unless `read_only`.

        With `forget_scores` all are: those of other images say nothing about which checkpoint is the best.

        Raises:
          UserError: the directory cannot be written to, or the scores of its checkpoints cannot be read.
        """
        self._directory = (workdir / DIRECTORY).absolute()
        self._aside = (workdir / DAMAGED).absolute()
        self._read_only = read_only
        self._forget_scores = forget_scores
        if not read_only:  # Orbax fails in a thread of its own, and the other processes wait ten minutes for it
            hosts.together(self._prepare)
        self._manager = self._open()

    def _prepare(self) -> None:
        if hosts.is_main():
            make_writable_directory(self._directory, name="--workdir's checkpoints")
            for step in steps_in(self._directory.parent):
                score = self.path(step) / "metrics"
                try:
                    json.loads((score / "metrics").read_bytes())
                    if self._forget_scores:
                        self._set_aside(score, f"{step}-score", f"{score} is of other images")
                except FileNotFoundError:
                    continue  # it was never evaluated
                except (OSError, ValueError) as error:
                    if isinstance(error, PermissionError):
                        raise UserError(f"{score} may not be read: give yourself the right to read it.") from error
                    self._set_aside(score, f"{step}-score", f"{score} cannot be read")

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager.

        `max_to_keep` with `best_fn` would delete the newest steps, and resuming would lose work; the policy below
        keeps the latest whatever their score.
        """
        best = BestN(get_metric_fn=_loss, reverse=True, n=BEST_KEPT, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(LATEST_KEPT), best]),
            best_fn=_loss,
            best_mode="min",
            enable_async_checkpointing=not self._read_only,
            read_only=self._read_only,
            create=False,
        )
        handlers = {STATE: ocp.PyTreeCheckpointHandler(), RECORD: ocp.JsonCheckpointHandler()}
        try:
            return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
        except ValueError as error:  # invalid JSON
            reason = " ".join(str(error).split())
            message = f"{self._directory}/*/metrics cannot be read ({reason}): move the damaged checkpoint away."
            raise UserError(message) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._explained():
            self._manager.close()

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          UserError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of this save, or of the one before, into one line."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, OSError):
                raise  # mostly a process that was lost while saving: starting all again resumes the run
            # TensorStore says the system's reason after the names of many files.
            full = next((os.strerror(number) for number in FULL if os.strerror(number) in str(error)), None)
            reason = full or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{self._directory}: a checkpoint could not be written ({reason}): fix that, and the same command "
                "resumes from the last one."
            ) from error

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def newest_finite(self) -> int | None:
        """Step of the newest checkpoint whose numbers and score are finite; None without any."""
        return next((step for step in self.steps() if self._record(step).get("finite", True)), None)

    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None where none has a score."""
        return self._manager.best_step()

    def path(self, step: int) -> pathlib.Path:
        """Where the checkpoint of a step is."""
        return self._directory / str(step)

    def save(self, state: TrainState, *, step: int, loss: float | None, evaluated: bool = True) -> None:
        """Starts to save; returns when the arrays are copied.

        Args:
          state: to save.
          step: its number.
          loss: of the step's evaluation; None where none was made.
          evaluated: False where there should have been an evaluation that was cut short.

        Raises:
          UserError: this checkpoint or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return  # Orbax would answer the same, silently
        tree, scored = state._asdict(), loss is not None and math.isfinite(loss)
        finite = is_finite(tree) and (loss is None or scored)
        record = {"checksums": checksums(tree), "evaluated": evaluated, "finite": finite}
        items = {STATE: ocp.args.PyTreeSave(tree), RECORD: ocp.args.JsonSave(record)}
        hosts.together(functools.partial(self._check_room, tree))
        with self._explained():  # Orbax would take a score of NaN for the best
            self._manager.save(step, args=ocp.args.Composite(**items), metrics={"loss": loss} if scored else None)

    def _check_room(self, tree: dict[str, Any]) -> None:
        """Raises a UserError where a checkpoint has no room: Orbax would print pages half-way through."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._directory).free
        if hosts.is_main() and needed > free:
            raise UserError(
                f"{self._directory}: a checkpoint takes up to {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free: "
                "make room, and the same command resumes from the last one."
            )

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """The newest whole checkpoint with finite numbers; None without any.

        The others are moved aside: somebody may look at them, and their steps are saved again.

        Raises:
          DamagedError: none of the checkpoints is whole.
        """
        tree = abstract._asdict()
        damaged: dict[int, str] = {}
        for step in self.steps():
            hosts.together(functools.partial(self.check, tree, step=step))
            try:
                restored = hosts.together(functools.partial(self.restore_tree, tree, step=step))
            except (DamagedError, hosts.ElsewhereError) as error:
                damaged[step] = str(error)
            else:
                self._set_all_aside(damaged)
                return Restored(type(abstract)(**restored), self._record(step).get("evaluated", True))
        if damaged:
            newest = next(iter(damaged.values()))
            raise DamagedError(f"{newest}; no other checkpoint is whole: put back a copy, or take a new workdir.")
        return None

    def _set_all_aside(self, damaged: dict[int, str]) -> None:
        if damaged:
            self._manager.close()

            def move() -> None:
                for step, reason in damaged.items():
                    if hosts.is_main():
                        self._set_aside(self.path(step), str(step), f"{reason}; the one before is used")

            hosts.together(move)
            self._manager = self._open()

    def _set_aside(self, path: pathlib.Path, name: str, reason: str) -> None:
        self._aside.mkdir(exist_ok=True)
        to = self._aside / f"{name}-{sum(1 for _ in self._aside.iterdir())}"
        path.rename(to)
        log(f"warning: {reason}, and it was moved to {to}")

    def restore_tree(self, abstract: dict[str, Any], *, step: int) -> dict[str, Any]:
        """The fields of a step's state that are named in `abstract`.

        Raises:
          DamagedError: the checkpoint cannot be read, does not hold what was saved, or numbers are not finite.
        """
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        directory = self.path(step)
        try:
            record = self._record(step)
            saved = record.get("checksums")
            restored = self._manager.restore(step, args=ocp.args.Composite(**{STATE: arguments}))[STATE]
            found = checksums(restored)
        except MemoryError:
            raise
        except Exception as error:  # the type depends on which file is damaged
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            elsewhere = isinstance(error, OSError) and error.filename and str(directory) not in str(error.filename)
            if elsewhere or OF_MACHINE.search(str(error)):
                raise UserError(
                    f"{directory} cannot be read now ({reason}): mend that, and give the same command again."
                ) from error
            raise DamagedError(f"{directory} cannot be restored ({reason})") from error
        # A version that had no such part saved nothing of it.
        differing = [name for name, values in found.items() if saved is not None and saved.get(name, []) != values]
        if differing:
            raise DamagedError(f"{directory} is damaged: {', '.join(differing)} differ from what was saved")
        if not (record.get("finite", True) and is_finite(restored)):
            raise DamagedError(f"{directory} holds parameters, or a score, that are not finite")
        return restored

    def check(self, abstract: dict[str, Any], *, step: int) -> None:
        """Checks what would make `restore_tree` call a whole checkpoint damaged.

        Raises:
          UserError: a part may not be read, or parameters have other shapes than the config's, which somebody changed.
        """
        _check_readable(self.path(step))
        try:
            saved = self._manager.item_metadata(step)[STATE].tree
        except Exception:  # damaged: restoring says so
            return
        for path, leaf in jax.tree.leaves_with_path({name: abstract[name] for name in abstract if name in WEIGHTS}):
            found = saved
            for key in path:
                found = found.get(getattr(key, "key", None)) if isinstance(found, dict) else None
            shape = getattr(found, "shape", None)
            if shape is not None and tuple(shape) != tuple(leaf.shape):
                raise UserError(
                    f"{self.path(step)}: {jax.tree_util.keystr(path)} has the shape {list(shape)}, and by "
                    f"config.json {list(leaf.shape)}: put back the config.json that the run was trained with."
                )

    def _record(self, step: int) -> dict[str, Any]:
        if not (self.path(step) / RECORD).exists():  # written by a version that kept none
            return {}
        return self._manager.restore(step, args=ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()}))[RECORD]
