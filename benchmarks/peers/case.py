"""What a worker's module makes of one peer, and what all of them have in common."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from facevae_jax.config import RunConfig
from facevae_jax.data import synthetic

FILTERS = (32, 64, 64, 64)  # of configs/gdl128.py, whose network every peer builds
LEAKY_RELU_SLOPE = 0.3
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99  # of the old value, as Keras and Flax count; PyTorch counts the new one's share
ADAM_EPSILON = 1e-7
# Of data in memory, where a trainer wants epochs: long enough that what it does between epochs costs next to nothing.
EPOCH_STEPS = 32


class Timing(NamedTuple):
    """What one stretch of training took."""

    images: int  # trained on; a trainer of whole epochs may round the number of steps that it was asked for
    seconds: float


class Case(NamedTuple):
    """A peer that is ready to train."""

    train: Callable[[int], Timing]  # for about so many steps
    parameters: int  # that it trains
    device: str
    versions: dict[str, str]


def fixed_batch(config: RunConfig) -> UInt8[np.ndarray, "b r r 3"]:
    """The one batch that every peer trains on."""
    return synthetic.faces(np.arange(config.train.batch_size), resolution=config.data.resolution)


def whole_epochs(steps: int) -> tuple[int, int]:
    """About so many steps as (epochs, steps of each)."""
    epoch = min(steps, EPOCH_STEPS)
    return max(1, round(steps / epoch)), epoch


def calibrate(train: Callable[[int], Timing], *, batch_size: int, seconds: float) -> float:
    """Warms up (the first call compiles) and returns the seconds of one step, timed over at least `seconds`."""
    train(3)
    steps = 1
    while (timing := train(steps)).seconds < seconds:
        steps *= 4
    return timing.seconds * batch_size / timing.images
