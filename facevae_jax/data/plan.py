"""Which rows a step sees: a pure function of (seed, step), so there is no iterator state to save.

Epoch e of a split of N images visits the rows in an order keyed by (seed, e), cut into N // batch_size batches; the
remaining images are dropped for that epoch. The order is never computed as a whole but row by row, so a step costs the
same with 10^9 images as with a thousand.
"""

import functools
import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

ROUNDS = 8  # of the Feistel network; 4 make a pseudo-random permutation of a large set (Luby & Rackoff 1988)
PADDING = -1  # in place of a row
SHUFFLE = zlib.crc32(b"shuffle")


@functools.lru_cache(maxsize=4)  # an epoch and, around its end, the next; of two feeds
def _round_functions(seed: int, epoch: int, base: int) -> Int[np.ndarray, "rounds base"]:
    """A random function from digit to digit for every round, keyed by (seed, epoch)."""
    keys = np.random.SeedSequence((seed, SHUFFLE, epoch)).generate_state(ROUNDS, np.uint64)
    return (splitmix64(keys[:, None] ^ np.arange(base, dtype=np.uint64)) % np.uint64(base)).astype(np.int32)


def shuffled_rows(positions: Int[np.ndarray, " n"], *, seed: int, epoch: int, images: int) -> Int[np.ndarray, " n"]:
    """The rows at `positions` of an epoch's order, a permutation of 0 to `images` - 1.

    A Feistel network over two digits in base ceil(sqrt(images)); it is applied again to a result beyond the last row
    until that is one (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 3 and 4).

    Args:
      positions: from 0 to `images` - 1.
      seed: of the run.
      epoch: from 0.
      images: in the split, below 2**31.
    """
    base = math.isqrt(images - 1) + 1
    functions = _round_functions(seed, epoch, base)
    rows, pending = positions.astype(np.int64), np.arange(len(positions))
    while len(pending):  # base**2 is at most 2 sqrt(images) above `images`: few need a second pass
        left, right = np.divmod(rows[pending], base)
        for function in functions:
            total = left + function[right]
            left, right = right, total - base * (total >= base)
        rows[pending] = result = base * left + right
        pending = pending[result >= images]
    return rows.astype(np.int32)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass over the split."""
    return images // batch_size


class BatchPlan(NamedTuple):
    """Decides which rows a step sees; the number of devices and hosts does not."""

    seed: int
    images: int
    batch_size: int

    def rows(self, batch: int, count: int = 1) -> Int[np.ndarray, "count b"]:
        """Rows of `count` global batches from number `batch` on."""
        numbers = np.arange(batch, batch + count)
        epochs, batches = np.divmod(numbers, steps_per_epoch(self.images, self.batch_size))
        positions = batches[:, None] * self.batch_size + np.arange(self.batch_size)
        rows = [
            shuffled_rows(positions[epochs == epoch].ravel(), seed=self.seed, epoch=int(epoch), images=self.images)
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(rows).reshape(positions.shape)


def padded_rows(rows: Int[np.ndarray, "k b"], *, parts: int, devices: int) -> Int[np.ndarray, "k c"]:
    """Batches whose parts are filled up with `PADDING` to a multiple of the number of devices.

    Every n-th row goes into one of n parts, so that each device finds its share of each part in its slice of the batch.
    """
    images = rows.shape[1] // parts
    padding = ((0, 0), (0, -images % devices), (0, 0))
    return np.pad(rows.reshape(-1, images, parts), padding, constant_values=PADDING).reshape(len(rows), -1)


def evaluation_rows(*, images: int, batch_size: int) -> Iterator[tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]]:
    """Every row once, in order, in batches of one size: (rows, which of them are not padding)."""
    for start in range(0, images, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(rows, images - 1), rows < images


def splitmix64(value: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """A bijection of uint64 whose output bits look independent, the same on every machine (Steele et al. 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
