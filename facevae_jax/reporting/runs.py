"""What runs have written: settings and metrics."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts.types import TRAIN
from facevae_jax.models.likelihoods import LIKELIHOODS
from facevae_jax.training.telemetry import METRICS_FILE, read_metrics
from facevae_jax.training.workdir import read_config

NONE = "–"  # noqa: RUF001 - the dash that tables use
MAX_NAME = 28  # characters of a run's name in charts


class Series(NamedTuple):
    """One figure over the steps of a run."""

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n ..."]  # NaN where it was not finite; a row for each record of a list


@dataclasses.dataclass(frozen=True)
class Run:
    """A run by its `config.json` and `metrics.jsonl`."""

    workdir: pathlib.Path
    name: str  # unique on the page
    config: RunConfig
    records: Sequence[dict[str, Any]]
    number: int = 0  # on the page; 0: the run that the page is about

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, in the order of their steps."""
        return [record for record in self.records if record["kind"] == "evaluation"]

    @property
    def evaluation_split(self) -> str:
        """The split that was evaluated; `evaluation` before the first evaluation."""
        return str(self.evaluations[-1].get("split", "evaluation")) if self.evaluations else "evaluation"

    @property
    def evaluated_images(self) -> str:
        """The images of that split, in words."""
        if self.evaluation_split == TRAIN:
            return "training images (there are too few validation images)"
        return images_of(self.evaluation_split)

    def evaluation_at(self, step: int) -> dict[str, Any] | None:
        """The evaluation after `step` steps."""
        return next((record for record in self.evaluations if record["step"] == step), None)

    def series(self, kind: str, key: str) -> Series:
        """A figure over the steps.

        Args:
          kind: `train` or `evaluation`.
          key: of the records, such as `loss`; records without it are left out.
        """
        found = [(record["step"], record[key]) for record in self.records if record["kind"] == kind and key in record]
        values = [math.nan if value is None else value for _, value in found]  # JSON has no NaN
        return Series(np.array([step for step, _ in found], np.int64), np.array(values, np.float64))

    @property
    def weight(self) -> str:
        """The weight of reconstruction against the KL, in a few words."""
        objective = self.config.objective
        parts = [LIKELIHOODS[objective.likelihood].describe(objective)]
        if objective.kl_weight != 1:
            parts.append(f"beta = {objective.kl_weight:g}")
        if objective.free_bits:
            parts.append(f"free bits {objective.free_bits:g} a {objective.free_bits_per}")
        return ", ".join(parts)


def open_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """The runs in some folders, each once, with names that tell them apart.

    Raises:
      UserError: one of them holds no run, or its files cannot be read.
    """
    distinct = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    names = tell_apart(distinct)
    return [
        Run(path, name, read_config(path), _read_records(path), number)
        for number, (path, name) in enumerate(zip(distinct, names, strict=True))
    ]


def _read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    try:
        records = read_metrics(workdir)
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / METRICS_FILE} cannot be read ({error}): repair or remove it.") from error
    whole = (record for record in records if isinstance(record, dict) and {"kind", "step"} <= set(record))
    return sorted(whole, key=lambda record: record["step"])


def tell_apart(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as make all names different."""
    most = max(len(path.parts) for path in paths)
    for parts in range(1, most + 1):
        names = [printable("/".join(path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def printable(text: str) -> str:
    """The text in one line, valid in XML and UTF-8: characters that are not printable become question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shortened(text: str) -> str:
    """The text; without its middle if it is longer than `MAX_NAME` characters."""
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME // 2 - 1]}…{text[-MAX_NAME // 2 :]}"


def images_of(split: str) -> str:
    """The images of a split, in words."""
    return "training images" if split == TRAIN else f"{split} images"


def number(value: float | None, form: str) -> str:
    """A figure, or a dash if it is missing or was not finite."""
    return NONE if value is None else format(value, form)
