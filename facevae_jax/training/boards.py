"""Writers of curves and pictures beside `metrics.jsonl`: TensorBoard and Weights & Biases, both optional."""

import abc
import contextlib
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import atomic_writer

WANDB_FOLDER = "wandb"
PROJECT = "facevae_jax"


class Board(abc.ABC):
    """One service that shows a run."""

    @abc.abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to each curve."""

    @abc.abstractmethod
    def picture(self, name: str, image: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Adds a picture."""

    @abc.abstractmethod
    def close(self, *, failed: bool) -> None:
        """Ends the record; `failed` where the run ended with an error."""


def open_boards(config: RunConfig, workdir: pathlib.Path, *, first_step: int) -> list[Board]:
    """The writers that the config asks for.

    Raises:
      UserError: a package is missing, or Weights & Biases refuses the run.
    """
    boards: list[Board] = []
    if config.train.tensorboard:
        boards.append(TensorBoard(workdir, first_step))
    if config.train.wandb:
        boards.append(WeightsAndBiases(config, workdir, first_step))
    return boards


class TensorBoard(Board):
    """Event files in `workdir/tensorboard`."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            message = 'config.train.tensorboard=True needs tensorboardX: pip install -e ".[tensorboard]".'
            raise UserError(message) from error
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:  # noqa: D102
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: UInt8[np.ndarray, "h w 3"], step: int) -> None:  # noqa: D102
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:  # noqa: D102
        self._writer.close()


class WeightsAndBiases(Board):
    """A run of the project `facevae_jax`, or of WANDB_PROJECT; a run that resumes here continues its own.

    WANDB_MODE=offline keeps the record in `workdir/wandb`, for `wandb sync`. What cannot be recorded later is lost, and
    training continues.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path, first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            message = 'config.train.wandb=True needs wandb: pip install -e ".[wandb]".'
            raise UserError(message) from error
        self._wandb = wandb
        self._lost = (wandb.errors.Error, OSError)  # OSError: its process is gone
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=workdir.name,
                dir=str(workdir),
                id=_identity(workdir / WANDB_FOLDER / "id", new=first_step == 0),
                resume="allow",
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),  # our streams stay ours
            )
        except (wandb.errors.Error, ValueError) as error:  # ValueError: of pydantic, for one of its variables
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"config.train.wandb=True: {reason}: run `wandb login` with a connection, or set WANDB_MODE=offline."
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:  # noqa: D102
        with contextlib.suppress(*self._lost):
            self._run.log(dict(values), step=step)

    def picture(self, name: str, image: UInt8[np.ndarray, "h w 3"], step: int) -> None:  # noqa: D102
        with contextlib.suppress(*self._lost):
            self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self, *, failed: bool) -> None:  # noqa: D102
        with contextlib.suppress(*self._lost):
            self._run.finish(exit_code=int(failed))


def _identity(path: pathlib.Path, *, new: bool) -> str:
    """The run's identity, drawn at its first step and kept there."""
    if new or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text().strip()


def numbers_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`, as `kind/name`; of a list, as `kind/name0`, `kind/name1`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        parts = enumerate(value) if isinstance(value, list) else [("", value)]  # a rate for each group
        found |= {f"{kind}/{name}{number}": part for number, part in parts if isinstance(part, (int, float))}
    return found
