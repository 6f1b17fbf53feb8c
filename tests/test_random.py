"""Bits drawn by their probability's binary digits: their share, independence and layout."""

import math

import jax
import numpy as np
import pytest

from facevae_jax.core import random
from facevae_jax.models.api import image_keys

SHAPE = (37, 30, 9)  # no multiple of 32 values


@pytest.mark.parametrize("probability", [0.75, 0.5, 0.9, 0.1, 1 - 2**-16, 0.3])
def test_each_bit_is_one_with_the_probability(probability):
    keys = image_keys(jax.random.key(1), 64)
    bits = np.asarray(random.unpack_bits(random.bernoulli_words(keys, probability, math.prod(SHAPE)), SHAPE))
    assert bits.shape == (64, *SHAPE)
    exact = random.representable(probability)
    assert abs(exact - probability) <= 2**-17
    deviation = (exact * (1 - exact) / bits.size) ** 0.5
    assert abs(bits.mean() - exact) < 5 * deviation
    # Neighbours in the image, in the word and in the batch have nothing to do with each other.
    for axis, step in ((0, 1), (1, 1), (2, 1), (3, 1)):
        pairs = np.logical_and(bits, np.roll(bits, step, axis=axis)).mean()
        assert abs(pairs - exact**2) < 8 * deviation


def test_a_probability_next_to_0_or_1_stays_there():
    keys = image_keys(jax.random.key(1), 4)
    for probability, expected in ((1e-9, 0.0), (1 - 1e-9, 1.0)):
        bits = random.unpack_bits(random.bernoulli_words(keys, probability, math.prod(SHAPE)), SHAPE)
        assert abs(np.mean(bits) - expected) < 1e-3


def test_the_bits_of_an_image_depend_on_its_key_alone():
    keys = image_keys(jax.random.key(1), 5)
    words = np.asarray(random.bernoulli_words(keys, 0.75, 100))
    np.testing.assert_array_equal(random.bernoulli_words(keys[3:], 0.75, 100), words[3:])
    assert (words[0] != words[1]).all()
