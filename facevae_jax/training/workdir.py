"""The workdir's `config.json` and `data.json`: what a run was started with, and what may change as it resumes."""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from facevae_jax.config import RunConfig
from facevae_jax.core import files, hosts
from facevae_jax.core.errors import FULL, UserError, expand_home, make_writable_directory
from facevae_jax.core.files import write_json
from facevae_jax.core.settings import flatten
from facevae_jax.data.dataset import Dataset
from facevae_jax.training import recovery
from facevae_jax.training.checkpoints import steps_in
from facevae_jax.training.telemetry import log

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
LOCK_FILE = ".lock"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:/")  # gs://bucket, of which a path leaves one slash
# Keys that decide, beside all of `model`, what the loss means, without which the best checkpoint is not the best, and
# which rows a step sees, without which a step is no position in an epoch.
FIXED_KEYS = (
    "data.name",
    "data.resolution",
    "data.synthetic_train_images",
    "data.synthetic_validation_images",
    "data.dequantize",
    "objective.likelihood",
    "objective.mixture_components",
    "objective.bits",
    "objective.variance",
    "objective.r_loss_factor",
    "objective.kl_weight",
    "objective.free_bits",
    "objective.free_bits_per",
    "train.batch_size",
    "train.seed",
    "train.optimizer",
)
FREE_KEYS = ("model.rematerialize",)  # of `model`, which change the memory alone
SWITCHES = ("train.ema_decay", "train.skip_factor")  # 0 leaves out a part of the state


@contextlib.contextmanager
def explained(workdir: str | pathlib.Path) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{error.filename or 'a file'} could not be written: {error.strerror}"
        raise UserError(f"--workdir={str(workdir)!r}: {reason}; fix that, and the same command resumes.") from error


def open_workdir(config: RunConfig, workdir: str | pathlib.Path, stack: contextlib.ExitStack) -> pathlib.Path:
    """The directory of the run, which no other run may use until the stack is closed or the process ends.

    Raises:
      UserError: it cannot be written to, holds another run, or another process trains there; or no checkpoint can be
        kept under its name.
    """
    if not hosts.is_main():
        return expand_home(workdir, name="--workdir")
    if ADDRESS.match(str(workdir)):
        raise UserError(f"--workdir={str(workdir)!r} is an address: give a folder of this machine.")
    recovery.check_name(expand_home(workdir, name="--workdir"))
    directory = make_writable_directory(workdir, name="--workdir")
    try:
        stack.enter_context(files.locked(directory / LOCK_FILE, wait=False))
    except files.LockedError as error:
        message = f"is in use by {error.strerror}: wait for that run, stop it, or take another workdir."
        raise UserError(f"--workdir={str(directory)!r} {message}") from error
    recovery.complete(directory)
    for line in write_or_check_config(directory, config):
        log(line)
    return directory


def read_config(workdir: pathlib.Path) -> RunConfig:
    """The config of the run in `workdir`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = workdir / CONFIG_FILE
    try:
        return RunConfig.from_saved(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"--workdir={str(workdir)!r} holds no run ({CONFIG_FILE} is missing): give the workdir of a training."
        raise UserError(message) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        remedy = "put back a copy of it, or take a new workdir"
        raise UserError(f"{path} cannot be read ({files.reason(error)}): {remedy}.") from error


def write_or_check_config(workdir: pathlib.Path, config: RunConfig) -> list[str]:
    """Writes `config.json`, or compares it where there is something to resume; returns a line for each change.

    Raises:
      UserError: a setting changed that the run in `workdir` was built on, or its `config.json` is missing.
    """
    exists, resumes = (workdir / CONFIG_FILE).exists(), bool(steps_in(workdir))
    if not exists and resumes:
        raise UserError(
            f"--workdir={str(workdir)!r} holds checkpoints but no {CONFIG_FILE}: "
            "put that run's back, or take a new workdir."
        )
    changed = differences(flatten(read_config(workdir).to_dict()), flatten(config.to_dict())) if exists else {}
    if not resumes:  # nothing is built on the settings: the last attempt may have failed for one of them
        changed = {}
    refused = {key: values for key, values in changed.items() if _is_fixed(key, *values)}
    if refused:
        listed = ", ".join(f"config.{key} was {old!r} and is now {new!r}" for key, (old, new) in refused.items())
        raise UserError(f"--workdir={str(workdir)!r} holds another run: {listed}; set it back or take a new workdir.")
    if changed or not resumes:
        write_json(workdir / CONFIG_FILE, config.to_dict())
    return [f"config.{key} changed from {old!r} to {new!r}" for key, (old, new) in changed.items()]


def check_data(workdir: pathlib.Path, dataset: Dataset, *, accept_new: bool) -> bool:
    """Records which images a run is trained on; returns whether its scores are of others than these.

    Args:
      workdir: of the run.
      dataset: that it is to be trained on.
      accept_new: whether they may be others.

    Raises:
      UserError: they are others: a dataset was prepared anew under the same name.
    """
    path, found = workdir / DATA_FILE, hashlib.sha256(dataset.fingerprint.encode()).hexdigest()
    split = dataset.evaluation_split
    now = {"name": dataset.name, "sizes": dict(dataset.sizes), "fingerprint": found, "evaluated": split}
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        before = now
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)}): delete it to accept the data.") from error
    changed = bool(steps_in(workdir)) and before.get("fingerprint") != found
    if changed and not accept_new:
        raise UserError(
            f"--workdir={str(workdir)!r} was trained on other images or labels: the dataset {dataset.name!r} "
            f"({before.get('sizes')}) was prepared anew ({now['sizes']}): put the earlier one back, take a new "
            "workdir, or add --accept_new_data."
        )
    if before != now or not path.exists():
        write_json(path, now)
    former = before.get("evaluated", "validation" if dataset.sizes.get("validation") else split)
    return changed or (bool(steps_in(workdir)) and former != split)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: {key: (old, new)}."""
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}


def _is_fixed(key: str, old: Any, new: Any) -> bool:
    switched = key in SWITCHES and (old == 0) != (new == 0)
    of_model = key.startswith("model.") and key not in FREE_KEYS
    return of_model or key in FIXED_KEYS or switched
