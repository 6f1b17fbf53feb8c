"""How smooth the paths from one face to another are, by features of any network."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SMALLEST_DISTANCE = 1e-12


class PathScores(NamedTuple):
    """Means over some paths; both are 1 for a straight path at a constant pace."""

    length: float  # sum of the steps / distance of the ends; above 1: the path leaves the straight line
    largest_step: float  # largest / mean step; above 1: the change comes in a jump


def path_scores(features: Float[np.ndarray, "n k d"]) -> PathScores | None:
    """Scores of `n` paths of `k` pictures each, from the features of the pictures.

    The steps are those of the perceptual path length (Karras et al. 2019, section 4.1) over a whole path instead of at
    a point. A path whose ends have equal features is left out; None if there is no other.
    """
    steps = np.linalg.norm(np.diff(features, axis=1), axis=2)
    distance = np.linalg.norm(features[:, -1] - features[:, 0], axis=1)
    moved = distance > SMALLEST_DISTANCE
    if not moved.any():
        return None
    steps, distance = steps[moved], distance[moved]
    return PathScores(
        length=float(np.mean(steps.sum(axis=1) / distance)),
        largest_step=float(np.mean(steps.max(axis=1) / steps.mean(axis=1))),
    )
