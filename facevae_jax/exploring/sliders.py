"""The page's sliders: attribute directions, and the latent dimensions that change the picture most."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.core.errors import UserError
from facevae_jax.generation import sheets
from facevae_jax.trained.directions import direction_of
from facevae_jax.trained.model import TrainedModel
from facevae_jax.trained.ranking import WEAK, attribute_scores

SHOWN = 8  # sliders of each kind by default: what fits beside the picture
MAX_ALPHA = 3.0  # standard deviations to either side


class Slider(NamedTuple):
    """One control: moves a face by alpha x step."""

    key: str  # its name in requests
    kind: Literal["attribute", "dimension"]
    label: str
    step: Float32[np.ndarray, " z"]  # one standard deviation of the latents
    score: float | None = None  # R² of an attribute's prediction from the latents
    weak: bool = False  # other things change more: not shown at first

    def describe(self) -> dict[str, Any]:
        """What the page shows, as JSON values."""
        return {key: value for key, value in self._asdict().items() if key != "step"}


def attribute_sliders(trained: TrainedModel, names: Sequence[str] = ()) -> tuple[list[Slider], list[str]]:
    """A slider per attribute, fitted to the labels of the training images, and a line about each to print.

    Args:
      trained: the model.
      names: the attributes, none of which is weak; () chooses the `SHOWN` that the latents predict best, best first, or
        none if this machine has no labels.

    Raises:
      UserError: one of `names` is not an attribute or has too few labels, or the run's data are missing.
    """
    sliders, lines = list[Slider](), list[str]()
    try:
        scores = attribute_scores(trained)
    except UserError as error:
        if names:
            raise
        return [], [f"note: no sliders for attributes: {error}"]
    for name in names or list(scores)[:SHOWN]:
        try:
            direction = direction_of(trained, name)
        except UserError as error:
            if names:
                raise
            lines.append(f"note: no slider for {name}: {error}")
            continue
        step = (direction.std * direction.vector).astype(np.float32)
        label = name.replace("_", " ")
        score = scores.get(name)
        weak = not names and score is not None and score < WEAK
        sliders.append(Slider(f"attribute:{name}", "attribute", label[:1].upper() + label[1:], step, score, weak))
        lines.append(direction.describe())
    return sliders, lines


def dimension_sliders(trained: TrainedModel, dimensions: Sequence[int] = ()) -> list[Slider]:
    """A slider per latent dimension; by default for the `SHOWN` that change the picture most.

    Raises:
      UserError: the model has no such dimension.
    """
    if wrong := [d for d in dimensions if not 0 <= d < trained.code_size]:
        raise UserError(f"--dimensions={wrong[0]}: the latents have dimensions 0 to {trained.code_size - 1}.")
    steps = np.diag(sheets.standard_deviations(trained))
    chosen = dimensions or sheets.strongest_dimensions(trained)[:SHOWN]
    return [Slider(f"dimension:{d}", "dimension", f"Dimension {d}", steps[d]) for d in dict.fromkeys(chosen)]
