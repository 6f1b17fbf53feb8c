"""A state whose parameters lie in one vector, for devices where each operation on an array costs a launch.

Adam of 43 arrays is some 80 launches of a GPU, and of one vector a few. Each number that a step changes is one more,
unless it lies in a vector with others. What the optimizer does to a number does not depend on its place, so results are
the same up to the order of sums.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from facevae_jax.training.setup import TrainState

SHORT = 2**12  # numbers of an array, at most, that is joined with others


class Vector(NamedTuple):
    """How the arrays of a tree lie in one vector."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Any) -> "Vector":
        """In the order of the tree's leaves."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(leaf.shape for leaf in leaves))

    def pack(self, tree: Any) -> Any:
        """The arrays, one after the other; a tree without arrays stays as it is."""
        if not self.shapes:
            return tree
        return jnp.concatenate([_outputs_first(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])

    def unpack(self, vector: Any) -> Any:
        """The inverse of `pack`."""
        if not self.shapes:
            return vector
        leaves, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            leaves.append(_outputs_last(vector[start:end], shape))
            start = end
        return jax.tree.unflatten(self.structure, leaves)


class Packing(NamedTuple):
    """How the parameters and the batch statistics of a state lie in vectors, and what has their structure."""

    params: Vector
    batch_stats: Vector

    @classmethod
    def of(cls, state: TrainState) -> "Packing":
        """For states like this."""
        return cls(Vector.of(state.params), Vector.of(state.batch_stats))

    def pack(self, state: TrainState) -> TrainState:
        """The state with a vector for each tree that has the structure of the parameters or of the batch statistics."""
        return jax.tree.map(
            lambda node: vector.pack(node) if (vector := self._vector(node)) else node,
            state,
            is_leaf=lambda node: self._vector(node) is not None,
        )

    def unpack(self, packed: TrainState, *, like: TrainState) -> TrainState:
        """The inverse of `pack` for states like that."""
        return jax.tree.map(
            lambda node, leaf: vector.unpack(leaf) if (vector := self._vector(node)) else leaf,
            like,
            packed,
            is_leaf=lambda node: self._vector(node) is not None,
        )

    def _vector(self, node: Any) -> Vector | None:
        structure = jax.tree.structure(node)
        return next((each for each in self if each.shapes and each.structure == structure), None)


class Joined(NamedTuple):
    """A packed state for a loop: its short arrays lie in one vector for each dtype, which is one launch each."""

    long: list[Array]
    short: dict[str, Array]  # by dtype

    @classmethod
    def of(cls, state: TrainState) -> "Joined":
        """The state's arrays."""
        leaves = jax.tree.leaves(state)
        short: dict[str, list[Array]] = {}
        for leaf in leaves:
            if leaf.size <= SHORT:
                short.setdefault(str(leaf.dtype), []).append(leaf.reshape(-1))
        long = [leaf for leaf in leaves if leaf.size > SHORT]
        return cls(long, {dtype: jnp.concatenate(parts) for dtype, parts in short.items()})

    def part(self, like: TrainState) -> TrainState:
        """The inverse of `of` for states like that."""
        long, starts, leaves = iter(self.long), dict.fromkeys(self.short, 0), []
        for leaf in jax.tree.leaves(like):
            if leaf.size > SHORT:
                leaves.append(next(long))
                continue
            dtype, start = str(leaf.dtype), starts[str(leaf.dtype)]
            starts[dtype] = start + leaf.size
            leaves.append(self.short[dtype][start : start + leaf.size].reshape(leaf.shape))
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _outputs_first(array: Array) -> Array:
    """A convolution's kernel as cuDNN reads and writes it, which then costs no transposition."""
    return array.transpose(3, 0, 1, 2) if array.ndim == 4 else array


def _outputs_last(values: Float[Array, " n"], shape: tuple[int, ...]) -> Array:
    return values.reshape(shape[3], *shape[:3]).transpose(1, 2, 3, 0) if len(shape) == 4 else values.reshape(shape)
