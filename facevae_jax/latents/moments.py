"""Mean and covariance of the aggregate posterior, q(z) = mean over images of q(z | x)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """Mean and covariance of the codes of `images` images."""

    mean: Float[np.ndarray, " z"]
    covariance: Float[np.ndarray, "z z"]
    images: int


def moments_of(mean: Float[np.ndarray, "n z"], log_variance: Float[np.ndarray, "n z"]) -> Moments:
    """Moments of the aggregate of some posteriors, in float64.

    The covariance includes the posteriors' own variances. Without them, whitening would blow up inactive dimensions,
    whose means hardly vary.
    """
    mean, variance = mean.astype(np.float64), np.exp(log_variance.astype(np.float64))
    covariance = np.cov(mean.T, bias=True).reshape(mean.shape[1], -1) + np.diag(variance.mean(axis=0))
    return Moments(mean.mean(axis=0), covariance, len(mean))
