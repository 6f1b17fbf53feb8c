"""Attribute directions of a trained model, fitted to the labels of its training images and kept in the run's folder."""

import contextlib
import difflib
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

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
      keep: attributes that are to stay as they are; `all` stands for every other one whose values have an order.

    Raises:
      UserError: there is no such attribute, or too few labels; the run's data are not there.
    """
    kept = kept_attributes(trained, attribute, keep)
    path = folder_of(trained) / f"{file_name(attribute, method, kept)}.json"
    found = _read(path, trained.latent_dim)
    if found is None or (found.attribute, found.method, sorted(found.kept)) != (attribute, method, sorted(kept)):
        given = labelled_latents(trained, (attribute, *kept))
        found = fit_direction(given.draws, given.whitening, given.labels[0], given.labels[1:], method=method)
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs time only
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, **found._asdict(), "vector": found.vector.tolist()})
    return found


def folder_of(trained: TrainedVAE) -> pathlib.Path:
    """Where directions and curves of the model and its labels are kept."""
    return trained.folder / DIRECTORY / latent_tables.identity(trained)


def kept_attributes(trained: TrainedVAE, attribute: str, keep: Sequence[str]) -> list[str]:
    """What `keep` stands for.

    Raises:
      UserError: there is no such attribute, or it has categories without an order; the edited one is among the kept.
    """
    kinds = {a.name: a.kind for a in latent_tables.attributes_of(trained)}
    ordered = [name for name, kind in kinds.items() if kind != "categorical"]
    kept = [name for name in ordered if name != attribute] if list(keep) == [KEEP_ALL] else list(keep)
    for flag, name in [("--attribute", attribute), *(("--keep", name) for name in kept)]:
        check_name(name, list(kinds), flag=flag)
        if name not in ordered:
            raise UserError(f"{flag}={name} has categories without an order: label one of them as binary instead.")
    if attribute in kept:
        raise UserError(f"--keep={attribute} is what --attribute edits: leave it out of one of the two.")
    return kept


class LabelledLatents(NamedTuple):
    """What directions and curves are fitted to."""

    draws: Float32[np.ndarray, "n z"]  # one from the posterior of each training image
    whitening: Whitening
    labels: tuple[Labels, ...]


def labelled_latents(trained: TrainedVAE, attributes: Sequence[str]) -> LabelledLatents:
    """The training split's latents and labels.

    Raises:
      UserError: the run's data are not there.
    """
    table = latent_tables.encode_split(trained, "train")
    return LabelledLatents(
        trained.posterior_sample(table.posterior),
        Whitening.of(table.mean, table.log_variance),
        tuple(_labels(table.labels, name) for name in attributes),
    )


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
    return Labels(name, kinds[name] == "binary", table.column(name))


def file_name(attribute: str, method: str, kept: Sequence[str]) -> str:
    """Names what is fitted, without its ending; of many attributes by a hash."""
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
