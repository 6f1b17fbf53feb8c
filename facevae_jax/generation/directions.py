"""Attribute directions of a trained model, fitted to the labels of its training images and kept in the run's folder."""

import contextlib
import difflib
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Sequence

import numpy as np

from facevae_jax.data.labels import AttributeTable
from facevae_jax.errors import UserError
from facevae_jax.files import write_json
from facevae_jax.generation import latent_tables
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.directions import Direction, EditMethod, Labels, Whitening, fit_direction

DIRECTORY = "directions"
KEEP_ALL = "all"  # every other attribute
FORMAT = 1  # of the files: another where their numbers come to mean something else
MAX_NAME = 100  # characters of a file name, beyond which it is a hash


def direction_of(
    trained: TrainedVAE, attribute: str, *, method: EditMethod = "mean", keep: Sequence[str] = ()
) -> Direction:
    """The direction of an attribute; fitted once to the training split, then read from `directions/`.

    Args:
      trained: the model.
      attribute: a name among the labels of the run's data.
      method: see `latents.directions.fit_direction`.
      keep: attributes that are to stay as they are; `all` stands for every other one.

    Raises:
      UserError: there is no such attribute, or too few labels; the run's data are not there.
    """
    names = [a.name for a in latent_tables.attributes_of(trained)]
    kept = [name for name in names if name != attribute] if list(keep) == [KEEP_ALL] else list(keep)
    for flag, name in [("--attribute", attribute), *(("--keep", name) for name in kept)]:
        check_name(name, names, flag=flag)
    if attribute in kept:
        raise UserError(f"--keep={attribute} is what --attribute edits: leave it out of one of the two.")
    path = trained.folder / DIRECTORY / trained.identity / f"{_file_name(attribute, method, kept)}.json"
    found = _read(path, trained.latent_dim)
    if found is None:
        table = latent_tables.encode_split(trained, "train")
        draws = trained.posterior_sample(table.posterior)
        whitening = Whitening.of(table.mean, table.log_variance)
        labels = {name: _labels(table.labels, name) for name in (attribute, *kept)}
        found = fit_direction(draws, whitening, labels[attribute], [labels[name] for name in kept], method=method)
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs time only
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, **found._asdict(), "vector": found.vector.tolist()})
    return found


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


def _labels(table: AttributeTable, name: str) -> Labels:
    kinds = {attribute.name: attribute.kind for attribute in table.attributes}
    if kinds[name] == "categorical":
        raise UserError(f"--attribute={name} has categories without an order: label one of them as binary instead.")
    return Labels(name, kinds[name] == "binary", table.column(name))


def _file_name(attribute: str, method: str, kept: Sequence[str]) -> str:
    name = urllib.parse.quote("-".join([attribute, method, *(["keeping", *sorted(kept)] if kept else [])]), safe="")
    return name if len(name) <= MAX_NAME else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _read(path: pathlib.Path, latent_dim: int) -> Direction | None:
    """What an earlier call kept; None where there is nothing whole that fits."""
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            return None
        direction = Direction(**values | {"kept": tuple(values["kept"]), "counts": tuple(values["counts"])})
        vector = np.asarray(direction.vector, np.float32)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return direction._replace(vector=vector) if vector.shape == (latent_dim,) else None
