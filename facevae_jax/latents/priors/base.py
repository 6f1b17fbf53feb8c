"""The interface of priors over codes.

A draw is a function of (key, index), so it depends neither on how many are drawn nor on the batch size.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Float32, Int, PRNGKeyArray

from facevae_jax.core import random
from facevae_jax.latents.moments import Moments

Indices = Int[ArrayLike, " n"]
Sampler = Callable[[PRNGKeyArray, Indices], Array]  # from a key and indices to codes


@runtime_checkable
class Unfinished(Protocol):
    """Where the state of a long fit is kept until it ends."""

    def load(self) -> dict[str, np.ndarray] | None:
        """What was saved last, if anything."""
        ...

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces what was saved."""
        ...

    def drop(self) -> None:
        """After the end."""
        ...


@runtime_checkable
class FitData(Protocol):
    """What priors are fitted to: codes of the run's data, encoded on demand."""

    code_shape: tuple[int, ...]
    code_size: int
    mesh: Mesh  # of the devices that may compute

    def moments(self) -> Moments:
        """Moments of the aggregate posterior of the training split."""
        ...

    def posteriors(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Means and log variances of `train`, with the mirror images where the run mirrors, or of `evaluation`."""
        ...

    def labels(self, split: str) -> Float32[np.ndarray, "n k"]:
        """Of the images of `posteriors(split)`: numbers of about unit size, NaN where unknown; k may be 0."""
        ...

    def unfinished(self, name: str) -> Unfinished:
        """The place of a fit that takes long."""
        ...

    def draws(self, split: str, *, at_least: int = 1) -> Float32[np.ndarray, "n z"]:
        """Draws from the posteriors of `train` or `evaluation`, equally many from each image."""
        ...


@runtime_checkable
class Prior(Protocol):
    """A distribution of flat codes; a pytree of arrays.

    One that is slow to fit has two more methods, `to_arrays(self) -> dict[str, np.ndarray]` and the class method
    `from_arrays(cls, arrays)`, its inverse: then it is fitted once and kept in the run's folder.
    """

    label: ClassVar[str]  # a few words to show
    description: ClassVar[str]  # one line

    @classmethod
    def fit(cls, data: FitData) -> "Prior":
        """Fitted to the training split."""
        ...

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: Any = 1.0) -> Float[Array, "n z"]:
        """Codes number `indices` of the stream `key`; `temperature` multiplies the standard deviations."""
        ...

    def log_density(self, codes: Float[Array, "n z"]) -> Float[Array, " n"]:
        """log p(code), or a lower bound, in nats."""
        ...


def is_kept(cls: Any) -> bool:
    """Whether the priors of a class are slow to fit, and so kept in the run's folder."""
    return hasattr(cls, "from_arrays")


def normal_by_index(key: PRNGKeyArray, indices: Indices, size: int) -> Float[Array, "n size"]:
    """Rows of N(0, I), each of which depends on its own index alone."""
    return random.normal(random.keys_of(key, indices), (size,))


def sampler(prior: Prior, *, temperature: float = 1.0) -> Sampler:
    """`prior.sample`, compiled once for all temperatures, as a function of key and indices."""
    return lambda key, indices: _sample(prior, key, indices, temperature)


@jax.jit
def _sample(prior: Prior, key: PRNGKeyArray, indices: Indices, temperature: Any) -> Array:
    return prior.sample(key, indices, temperature=temperature)


@jax.jit
def log_density(prior: Prior, codes: Float[ArrayLike, "n z"]) -> Float[Array, " n"]:
    """`prior.log_density`, compiled."""
    return prior.log_density(jnp.asarray(codes))
