"""Attribute directions of a trained model, fitted to the labels of its training images and kept as artifacts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from facevae_jax.core.errors import UserError, check_choice
from facevae_jax.latents.directions import METHODS, Direction, EditMethod, Labels, Whitening, fit_direction
from facevae_jax.latents.moments import moments_of
from facevae_jax.trained.codes import posterior_sample
from facevae_jax.trained.labels import check_name
from facevae_jax.trained.model import TrainedModel

KEEP_ALL = "all"  # every other attribute


def direction_of(
    trained: TrainedModel, attribute: str, *, method: EditMethod = "mean", keep: Sequence[str] = ()
) -> Direction:
    """The direction of an attribute; fitted once to the training split, then read.

    Args:
      trained: the model.
      attribute: a name among the labels of the run's data.
      method: see `latents.directions.fit_direction`.
      keep: attributes that are to stay as they are; `all` stands for every other one whose values have an order.

    Raises:
      UserError: there is no such attribute or method, or there are too few labels; the run's data are not there.
    """
    check_choice(method, METHODS, name="method")
    kept = kept_attributes(trained, attribute, keep)
    name = f"direction-{method}-{'+'.join([attribute, *sorted(kept)])}"
    found = trained.artifacts.get(name)
    if found is not None:
        facts = {**found.facts, "kept": tuple(found.facts["kept"]), "counts": tuple(found.facts["counts"])}
        return Direction(vector=found.arrays["vector"], **facts)
    draws, whitening, (edited, *others) = labelled_codes(trained, (attribute, *kept))
    direction = fit_direction(draws, whitening, edited, others, method=method)
    facts = direction._asdict()
    trained.artifacts.put(name, {"vector": facts.pop("vector")}, facts)
    return direction


def kept_attributes(trained: TrainedModel, attribute: str, keep: Sequence[str]) -> list[str]:
    """What `keep` stands for.

    Raises:
      UserError: there is no such attribute, or it has categories without an order; the edited one is among the kept.
    """
    kinds = {attribute.name: attribute.kind for attribute in trained.dataset.attributes}
    ordered = [name for name, kind in kinds.items() if kind != "categorical"]
    kept = [name for name in ordered if name != attribute] if list(keep) == [KEEP_ALL] else list(keep)
    for flag, name in [("--attribute", attribute), *(("--keep", name) for name in kept)]:
        check_name(name, list(kinds), flag=flag)
        if name not in ordered:
            raise UserError(f"{flag}={name} has categories without an order: label one of them as binary instead.")
    if attribute in kept:
        raise UserError(f"--keep={attribute} is what --attribute edits: leave it out of one of the two.")
    return kept


def labelled_codes(
    trained: TrainedModel, attributes: Sequence[str]
) -> tuple[Float32[np.ndarray, "n z"], Whitening, list[Labels]]:
    """What directions and curves are fitted to: a draw from the posterior of each training image, and its labels.

    Raises:
      UserError: the run's data are not there.
    """
    table = trained.codes.table("train")
    kinds = {attribute.name: attribute.kind for attribute in table.labels.attributes}
    labels = [Labels(name, kinds[name] == "binary", table.labels.column(name)) for name in attributes]
    return posterior_sample(table.posterior), Whitening.of(moments_of(*table.posterior)), labels
