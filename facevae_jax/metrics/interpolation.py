"""How smooth and how lifelike the way from one face to another is, by features of any network."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SMALLEST_DISTANCE = 1e-12


class Ways(NamedTuple):
    """Of ways of some pictures each, means over them; both are 1 of a straight way at a constant pace."""

    length: float  # the sum of the steps to the distance of the ends: above 1, the way leaves the straight line
    largest_step: float  # to the mean step: above 1, the change comes in a jump


def ways(features: Float[np.ndarray, "n k d"]) -> Ways | None:
    """Scores of `n` ways of `k` pictures each, from the features of the pictures.

    The steps are those of the perceptual path length (Karras et al. 2019, section 4.1) taken over a whole way instead
    of at a point, so that they say how evenly it is passed. A way whose ends have the same features is left out;
    None where all have.
    """
    steps = np.linalg.norm(np.diff(features, axis=1), axis=2)
    distance = np.linalg.norm(features[:, -1] - features[:, 0], axis=1)
    moved = distance > SMALLEST_DISTANCE
    if not moved.any():
        return None
    steps, distance = steps[moved], distance[moved]
    return Ways(
        length=float(np.mean(steps.sum(axis=1) / distance)),
        largest_step=float(np.mean(steps.max(axis=1) / steps.mean(axis=1))),
    )
