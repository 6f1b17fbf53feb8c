"""Attributes by how well the codes predict them: what report and explorer show first."""

from collections.abc import Mapping, Sequence

import numpy as np

from facevae_jax.data.layouts.types import Attribute
from facevae_jax.latents.directions import MIN_IMAGES, cross_validate
from facevae_jax.trained.directions import labelled_codes
from facevae_jax.trained.model import TrainedModel

ARTIFACT = "attribute-r2"
MOST_IMAGES = 16_384  # that R² is estimated from: more change its third digit
WEAK = 0.2  # R² below which an edit changes other things more than the attribute


def attribute_scores(trained: TrainedModel) -> dict[str, float]:
    """R² of each attribute as a line along its direction predicts it, the best first; computed once, then read.

    Cross-validated on draws from the posteriors of training images. Binary attributes count as the numbers 0 and 1, so
    that all attributes have the same figure. Left out: categories without an order, and labels that are too few or all
    the same.

    Raises:
      UserError: the run's data are not there.
    """
    names = [attribute.name for attribute in trained.dataset.attributes if attribute.kind != "categorical"]
    found = trained.artifacts.get(ARTIFACT)
    scores = found.facts["scores"] if found is not None else _compute(trained, names)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _compute(trained: TrainedModel, names: Sequence[str]) -> dict[str, float]:
    scores = {}
    if names:
        draws, whitening, labels = labelled_codes(trained, names)
        rows = np.linspace(0, len(draws) - 1, min(MOST_IMAGES, len(draws))).round().astype(int)
        whitened = whitening.whiten(draws[rows])
        for label in labels:
            values = label.values[rows].astype(np.float64)
            known = np.isfinite(values)
            sizes = [np.sum(values == value) for value in (0, 1)] if label.binary else [known.sum()]
            if min(sizes) >= MIN_IMAGES and np.std(values[known]):
                scores[label.name], _ = cross_validate(whitened[known], values[known], binary=False, method="mean")
    trained.artifacts.put(ARTIFACT, {}, {"scores": scores})
    return scores


def best_first(attributes: Sequence[Attribute], scores: Mapping[str, float]) -> list[Attribute]:
    """Attributes by their R²; those without one last, in their order."""
    return sorted(attributes, key=lambda attribute: -scores.get(attribute.name, -np.inf))
