"""What a page's sliders move a face along: attributes, and the latent dimensions that change the picture most."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.errors import UserError
from facevae_jax.generation import latent_tables, sheets
from facevae_jax.generation.directions import direction_of
from facevae_jax.generation.trained import TrainedVAE

SHOWN = 8  # sliders of a kind where none are named: what fits beside the picture
MAX_ALPHA = 3.0  # standard deviations: a slider goes so far to either side


class Slider(NamedTuple):
    """One control: a face moves by alpha x step."""

    key: str  # by which the page names it
    kind: Literal["attribute", "dimension"]
    label: str
    step: Float32[np.ndarray, " z"]  # one standard deviation of the latents


def attribute_sliders(trained: TrainedVAE, names: Sequence[str] = ()) -> tuple[list[Slider], list[str]]:
    """A slider for each attribute, fitted to the labels of the training images, and a line about each.

    Args:
      trained: the model.
      names: which attributes; () for a handful, which is none where there are no labels on this machine.

    Raises:
      UserError: one of `names` is no attribute, or has too few labels; they are given but the run's data are not there.
    """
    sliders, lines = list[Slider](), list[str]()
    try:
        for name in names or default_attributes(trained):
            try:
                direction = direction_of(trained, name)
            except UserError as error:
                if names:
                    raise
                lines.append(f"note: {name} has no slider: {error}")
                continue
            step = (direction.std * direction.vector).astype(np.float32)
            label = name.replace("_", " ")
            sliders.append(Slider(f"attribute:{name}", "attribute", label[:1].upper() + label[1:], step))
            lines.append(direction.describe())
    except UserError as error:
        if names:
            raise
        lines.append(f"note: no attribute has a slider: {error}")
    return sliders, lines


def default_attributes(trained: TrainedVAE) -> list[str]:
    """At most `SHOWN` attributes of the run's data, which may have none: the preferred ones, then any.

    Raises:
      UserError: the run's data are not there.
    """
    attributes = sheets.editable(latent_tables.attributes_of(trained))
    return [attribute.name for attribute in sheets.shown_attributes(attributes, SHOWN)]


def dimension_sliders(trained: TrainedVAE, dimensions: Sequence[int] = ()) -> list[Slider]:
    """A slider for each latent dimension; for `SHOWN` that change the picture most where none is named.

    Raises:
      UserError: the latents have no such dimension.
    """
    if wrong := [d for d in dimensions if not 0 <= d < trained.latent_dim]:
        raise UserError(f"--dimensions={wrong[0]}: the latents have dimensions 0 to {trained.latent_dim - 1}.")
    steps = np.diag(sheets.standard_deviations(trained))
    chosen = dimensions or sheets.strongest_dimensions(trained)[:SHOWN]
    return [Slider(f"dimension:{d}", "dimension", f"Dimension {d}", steps[d]) for d in dict.fromkeys(chosen)]
