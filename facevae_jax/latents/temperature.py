"""Factors on the standard deviations that samples are drawn with: one for all, or one for each resolution."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from facevae_jax.core.errors import UserError

MAX_TEMPERATURE = 10.0

Temperature = float | Mapping[int, float]  # of all groups; or from a resolution on, such as {1: 1.0, 16: 0.8}


class Temperatures(NamedTuple):
    """Of the code, and of each group of latents below it."""

    code: float
    details: tuple[float, ...]


def temperatures(given: Temperature, detail_shapes: Sequence[tuple[int, ...]]) -> Temperatures:
    """What a temperature means for the groups of a model.

    Args:
      given: one number; or a number for each resolution from which on it holds, up to the next. The code has that of
        resolution 1.
      detail_shapes: of the groups below the code, `models.api.Model.detail_shapes`.

    Raises:
      UserError: a number is out of range, or the model has one resolution of latents.
    """
    steps = dict(sorted(given.items(), key=lambda pair: int(pair[0]))) if isinstance(given, Mapping) else {1: given}
    numbers = [isinstance(value, int | float | np.number) and 0 <= value <= MAX_TEMPERATURE for value in steps.values()]
    if not all(numbers):
        wrong = [value for value, right in zip(steps.values(), numbers, strict=True) if not right]
        raise UserError(f"--temperature={wrong[0]!r:.40} must be a number from 0 to {MAX_TEMPERATURE:g}.")
    if isinstance(given, Mapping):
        if not detail_shapes:
            raise UserError("--temperature: this model has no groups of latents below its code: give one number.")
        sides = {shape[0] for shape in detail_shapes}
        missing = [resolution for resolution in steps if resolution not in {1, *sides}]
        if missing or 1 not in steps:
            named = f"no groups at {missing[0]}" if missing else "begin with 1, for the code"
            raise UserError(f"--temperature: {named}: groups below the code have {', '.join(map(str, sorted(sides)))}.")

    def at(resolution: int) -> float:
        return next(value for low, value in reversed(steps.items()) if low <= resolution)

    return Temperatures(steps[1], tuple(at(shape[0]) for shape in detail_shapes))
