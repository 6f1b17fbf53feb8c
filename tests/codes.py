"""Codes that priors are fitted to without a model (`latents.priors.base.FitData`)."""

import math

import jax
import numpy as np

from facevae_jax.latents.moments import moments_of
from facevae_jax.training.setup import make_mesh


class Place:
    """Where an unfinished fit is kept: in memory."""

    def __init__(self):
        self.saved, self.saves = None, 0

    def load(self):
        return self.saved

    def save(self, arrays):
        self.saved, self.saves = arrays, self.saves + 1

    def drop(self):
        self.saved = None


class Codes:
    """The same posteriors for both splits; their means are the draws."""

    def __init__(self, mean, log_variance, *, labels=None, shape=None, devices=1):
        self.split = mean, log_variance
        self.known = np.empty((len(mean), 0), np.float32) if labels is None else labels
        self.code_shape = shape or mean.shape[1:]
        self.code_size, self.place = math.prod(self.code_shape), Place()
        self.mesh = make_mesh(jax.devices()[:devices])

    def moments(self):
        return moments_of(*self.split)

    def posteriors(self, split):
        return self.split

    def draws(self, split, *, at_least=1):
        return self.split[0]

    def labels(self, split):
        return self.known

    def unfinished(self, name):
        return self.place
