"""The interface of a peer, and what all peers have in common."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from facevae_jax.config import RunConfig
from facevae_jax.data.drawn import synthetic

FILTERS = (32, 64, 64, 64)  # every peer builds the network of configs/gdl128.py
LEAKY_RELU_SLOPE = 0.3
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99  # of the old value, as Keras and Flax count; PyTorch counts the new one's share
ADAM_EPSILON = 1e-7
EPOCH_STEPS = 32  # for trainers that work in epochs: enough to make the work between epochs negligible


class Case(NamedTuple):
    """A peer that is ready to train."""

    train: Callable[[int], float]  # for so many steps; returns the seconds that they take
    parameters: int  # trainable
    device: str
    versions: dict[str, str]


def fixed_batch(config: RunConfig) -> UInt8[np.ndarray, "b r r 3"]:
    """The one batch that every peer trains on."""
    return synthetic.faces(np.arange(config.train.batch_size), resolution=config.data.resolution)


def by_epochs(train: Callable[[int, int], float]) -> Callable[[int], float]:
    """`Case.train` of a trainer that takes (epochs, steps of an epoch), scaled to the steps that are asked for."""

    def scaled(steps: int) -> float:
        epoch = min(steps, EPOCH_STEPS)
        epochs = max(1, round(steps / epoch))
        return train(epochs, epoch) * steps / (epochs * epoch)

    return scaled
