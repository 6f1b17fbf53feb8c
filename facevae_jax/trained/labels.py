"""Labels as numbers, which a prior may depend on, and wanted labels as they are typed: `Smiling=1`."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import AttributeTable
from facevae_jax.data.layouts.types import Attribute

EMPHASIS = 1.3  # of wanted binary labels, against those of the data
FLAG = "--attribute"


class LabelColumns(NamedTuple):
    """How labels become numbers of about unit size: one for each attribute, or for each of its categories."""

    attributes: tuple[Attribute, ...]
    mean: Float32[np.ndarray, " k"]
    deviation: Float32[np.ndarray, " k"]

    @classmethod
    def of(cls, labels: AttributeTable) -> "LabelColumns":
        """With the moments of the known labels."""
        values = expand(labels.attributes, labels.values)
        known = ~np.isnan(values)
        count, filled = np.maximum(known.sum(axis=0), 1), np.where(known, values, 0.0)
        mean = filled.sum(axis=0) / count
        variance = np.where(known, np.square(values - mean[None]), 0.0).sum(axis=0) / count
        deviation = np.where(variance > 0, np.sqrt(variance), 1.0)
        return cls(labels.attributes, mean.astype(np.float32), deviation.astype(np.float32))

    def standardized(self, values: Float32[np.ndarray, "n a"]) -> Float32[np.ndarray, "n k"]:
        """Labels as numbers; NaN stays NaN."""
        return (expand(self.attributes, values) - self.mean[None]) / self.deviation[None]

    def wanted(self, row: Float32[np.ndarray, " a"]) -> Float32[np.ndarray, " k"]:
        """A row that samples are to have: yes and no lie further apart than in the data, since a flow blurs them."""
        widths = [len(attribute.categories) or 1 for attribute in self.attributes]
        factors = [EMPHASIS if attribute.kind == "binary" else 1.0 for attribute in self.attributes]
        return self.standardized(row[None])[0] * np.repeat(factors, widths).astype(np.float32)


def expand(attributes: Sequence[Attribute], values: Float32[np.ndarray, "n a"]) -> Float32[np.ndarray, "n k"]:
    """Each categorical attribute as one column for each category."""
    columns = []
    for attribute, column in zip(attributes, values.T, strict=True):
        if attribute.kind == "categorical":
            one_hot = (column[:, None] == np.arange(len(attribute.categories))).astype(np.float32)
            columns.append(np.where(np.isnan(column)[:, None], np.float32(np.nan), one_hot))
        else:
            columns.append(column[:, None])
    return np.concatenate([np.empty((len(values), 0), np.float32), *columns], axis=1).astype(np.float32)


def parse(attributes: Sequence[Attribute], wanted: Sequence[str]) -> Float32[np.ndarray, " a"]:
    """A row of labels, NaN where nothing is wanted.

    Raises:
      UserError: there is no such attribute, or no such value of it.
    """
    names = [attribute.name for attribute in attributes]
    row = np.full(len(names), np.nan, np.float32)
    for text in wanted:
        name, value = _cut(text, names)
        if value is None:
            raise UserError(f"{FLAG}={text}: say which value, such as {FLAG}={text}=1.")
        check_name(name, names, flag=FLAG)
        attribute = attributes[names.index(name)]
        row[names.index(name)] = _value(attribute, value)
    return row


def _value(attribute: Attribute, text: str) -> float:
    """The number of a value as it is typed."""
    if text in attribute.categories:
        return float(attribute.categories.index(text))
    allowed = {"binary": "0 or 1", "continuous": "a number", "categorical": f"one of {', '.join(attribute.categories)}"}
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    possible = {"binary": value in (0.0, 1.0), "continuous": bool(np.isfinite(value)), "categorical": False}
    if not possible[attribute.kind]:
        raise UserError(f"{FLAG}={attribute.name}={text}: the value must be {allowed[attribute.kind]}.")
    return value


def with_commas(parts: Sequence[str], attributes: Sequence[Attribute]) -> list[str]:
    """Attributes, alone or as name=value, that a flag was cut into at every comma, though they have some themselves."""
    parts, found = list(parts), []
    names = [attribute.name for attribute in attributes]
    categories = {attribute.name: attribute.categories for attribute in attributes}

    def means_one(text: str) -> bool:
        name, value = _cut(text, names)
        return text in names or (value is not None and ("," not in value or value in categories.get(name, ())))

    while parts:
        joined = {sep.join(parts[:n]): n for n in range(len(parts), 1, -1) for sep in (", ", ",")}
        known = [text for text in joined if _cut(text, names)[0] in names]
        text = next(filter(means_one, known), parts[0])
        found.append(text)
        parts = parts[joined.get(text, 1) :]
    return found


def _cut(text: str, names: Sequence[str]) -> tuple[str, str | None]:
    """Name and value of name=value, either of which may have an equals sign; no value where there is none."""
    known = sorted((name for name in names if text == name or text.startswith(f"{name}=")), key=len)
    if known:
        return known[-1], text[len(known[-1]) + 1 :] if text != known[-1] else None
    name, equals, value = text.rpartition("=")
    return (name, value) if equals else (text, None)


def check_name(name: str, names: Sequence[str], *, flag: str) -> None:
    """Raises a UserError that suggests the nearest names, for an attribute that the images do not have."""
    if name in names:
        return
    if not names:
        raise UserError(f"{flag}={name}: the run's images have no labels: see --attributes of facevae_jax.prepare.")
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    near = "did you mean" if close else "there are"
    raise UserError(
        f"{flag}={name}: there is no such attribute; {near} {', '.join(lower[n] for n in close) or ', '.join(names)}?"
    )
