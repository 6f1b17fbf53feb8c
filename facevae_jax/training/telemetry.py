"""The record of a run: lines on the screen, a progress bar, `metrics.jsonl` and boards such as TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from facevae_jax.config import RunConfig
from facevae_jax.core import hosts
from facevae_jax.core.files import atomic_writer
from facevae_jax.training.boards import Board, numbers_of

METRICS_FILE = "metrics.jsonl"


def log(line: str) -> None:
    """Prints a line above the progress bar, in process 0 alone."""
    if hosts.is_main():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def log_error(line: str) -> None:
    """Prints a line on standard error, in any process."""
    tqdm.write(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()


class Telemetry:
    """The record of one run; use as a context manager."""

    def __init__(
        self, workdir: pathlib.Path, config: RunConfig, boards: Sequence[Board], *, first_step: int, total_steps: int
    ) -> None:
        """Opens the record, and drops what a killed run wrote after the checkpoint that it resumes from.

        Of several processes only process 0 writes and shows anything.
        """
        silent = not hosts.is_main()
        if not silent:
            _drop_after(workdir, first_step)
        path = os.devnull if silent else workdir / METRICS_FILE
        self._file = open(path, "a", buffering=1)  # noqa: SIM115, PTH123 - closed in __exit__
        self._boards = boards
        self._batch_size = config.train.batch_size
        self._bar = tqdm(
            total=total_steps * self._batch_size,
            initial=first_step * self._batch_size,
            unit="image",
            unit_scale=True,
            dynamic_ncols=True,
            disable=silent or None,  # None: no bar without a terminal, where it would fill a log file
        )
        self._steps_left = total_steps - first_step
        self.training_seconds = 0.0  # of all dispatches
        self._data_seconds = 0.0
        self._evaluation_seconds = 0.0
        self._started: float | None = None
        self._steps = 0

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._file.close()
        for board in self._boards:
            board.close(failed=exception[0] is not None)

    def advance(self, steps: int, *, seconds: float, data_seconds: float) -> None:
        """Moves the bar by a dispatch that took `seconds`, of which the device waited `data_seconds` for its data."""
        if self._started is None:
            self._started = time.perf_counter() - seconds
        self._steps += steps
        self._steps_left -= steps
        self.training_seconds += seconds
        self._data_seconds += data_seconds
        self._bar.set_postfix_str(f"data wait {self.data_wait:.1%}", refresh=False)
        self._bar.update(steps * self._batch_size)

    @property
    def data_wait(self) -> float:
        """Share of the training time in which the device waited for data."""
        return self._data_seconds / self.training_seconds if self.training_seconds else 0.0

    def evaluated(self, seconds: float) -> None:
        """Counts an evaluation that took `seconds`."""
        self._evaluation_seconds += seconds

    @property
    def outside(self) -> float:
        """Share of the time since the first step that went neither into training nor into evaluation."""
        if self._started is None:
            return 0.0
        wall = time.perf_counter() - self._started
        return max(0.0, 1.0 - (self.training_seconds + self._evaluation_seconds) / wall)

    @property
    def time_left(self) -> str:
        """Training time still to come at the rate so far, as [h:]mm:ss."""
        return tqdm.format_interval(self._steps_left * self.training_seconds / max(self._steps, 1))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one JSON line {"kind", "step", "time", ...values}, and the numbers to the boards as `kind/name`.

        `time` is in seconds since 1970.
        """
        finite = {name: _finite(value) for name, value in values.items()}
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        for board in self._boards:
            board.scalars(numbers_of(kind, values), step)

    def picture(self, name: str, image: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Adds a picture to the boards."""
        for board in self._boards:
            board.picture(name, image, step)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null keeps every line readable by any parser."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records in `metrics.jsonl`; a last line that a kill cut short, or a damaged one, is left out."""
    path = workdir / METRICS_FILE
    records = []
    if path.exists():
        for line in path.read_text(errors="replace").split("\n"):
            with contextlib.suppress(ValueError):  # cut short by a kill, or damaged
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                    records.append(record)
    return records


def _drop_after(workdir: pathlib.Path, step: int) -> None:
    if not (workdir / METRICS_FILE).exists():
        return
    records = read_metrics(workdir)
    with atomic_writer(workdir / METRICS_FILE) as file:  # without lines that a kill cut short, too
        for record in records:
            if record["step"] <= step:
                file.write((json.dumps(record) + "\n").encode())
