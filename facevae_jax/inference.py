"""A model on arrays of any length: batches of few shapes, on one device or on all of them.

Codes are flat here, [n, z], whatever their shape in the model: what is fitted to them and moves them needs vectors.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from facevae_jax.core import random
from facevae_jax.core.random import named_key
from facevae_jax.models.api import Gaussian, Model, to_pixels

PIXELS_AT_ONCE = 64 * 128**2  # of a batch on one device: 256 images of 64x64, 64 of 128x128, one of 1024x1024
ACTIVATIONS_AT_ONCE = 2**25  # numbers of a batch's largest activation on one device: an image of `vdvae_ffhq256`
BATCHES_IN_FLIGHT = 2  # one computes while the result of the other is fetched and used


def encode(model: Model, variables: Any, images: Shaped[Array, "b ..."]) -> Gaussian:
    """The posterior of the flat code [b, z] of images, uint8 or in [0, 1]."""
    posterior = model.apply(variables, images, method="encode")
    return Gaussian(*(part.reshape(images.shape[0], -1) for part in posterior))


class Detailed(NamedTuple):
    """Flat codes, and the values of the groups of latents below them, as of `Model.details`."""

    codes: Any  # float32 [b, z], in the host's memory or the device's
    details: Any  # float32 [b, d]


class Draws(NamedTuple):
    """Flat codes, and where the values of the groups below them are drawn from."""

    codes: Any  # float32 [b, z]
    keys: Any  # uint32 [b, ...], the data of a key for each row
    temperatures: Any  # float32 [b, g], of each group: factors on the standard deviations


def decode(model: Model, variables: Any, codes: Float[Array, "b z"]) -> UInt8[Array, "b ..."]:
    """Pixels of flat codes, with all groups of latents below them at the means of their priors."""
    return _pixels(model, variables, codes)


def decode_detailed(model: Model, variables: Any, given: Detailed) -> UInt8[Array, "b ..."]:
    """Pixels of flat codes and of the groups below them."""
    return _pixels(model, variables, *given)


def decode_draws(model: Model, variables: Any, draws: Draws) -> UInt8[Array, "b ..."]:
    """Pixels of flat codes, with the groups below them drawn from their priors."""
    return _pixels(model, variables, draws.codes, draw_details(model, variables, draws))


def draw_details(model: Model, variables: Any, draws: Draws) -> Float[Array, "b d"]:
    """Values of the groups below codes, each row by its own key."""
    keys, parts = jax.random.wrap_key_data(draws.keys), [jnp.zeros((len(draws.keys), 0))]
    for group, shape in enumerate(model.detail_shapes):
        drawn = random.normal(random.substream(keys, group), (math.prod(shape),))
        parts.append(draws.temperatures[:, group, None] * drawn)
    return jnp.concatenate(parts, axis=1)


def details_of(model: Model, variables: Any, images: Shaped[Array, "b ..."]) -> Float[Array, "b d"]:
    """`Model.details` of images."""
    found: Array = model.apply(variables, images, method="details")
    return found


def _pixels(model: Model, variables: Any, codes: Any, details: Any = None) -> UInt8[Array, "b ..."]:
    decoded = model.apply(variables, codes.reshape(-1, *model.code_shape), details, method="decode")
    return to_pixels(decoded.mean)


def reconstruct(model: Model, variables: Any, images: Shaped[Array, "b ..."]) -> UInt8[Array, "b ..."]:
    """Pixels of the reconstructions from the means of the posteriors, of all groups of latents."""
    return to_pixels(model.apply(variables, images, None, train=False).decoded.mean)


class Encoded(NamedTuple):
    """Posteriors of codes in the host's memory, a row for each image."""

    mean: Float32[np.ndarray, "n ..."]
    log_variance: Float32[np.ndarray, "n ..."]


class Inference:
    """Encodes and decodes numpy arrays with one model."""

    def __init__(self, model: Model, variables: Any, mesh: Mesh | None = None, *, batch_size: int = 0) -> None:
        """Compiles as it is asked.

        Args:
          model: the network.
          variables: its parameters and batch statistics, on all devices of the mesh.
          mesh: cuts a batch along its first axis; None: the default device alone.
          batch_size: images at a time, at most; 0: what `PIXELS_AT_ONCE` and `ACTIVATIONS_AT_ONCE` allow.
        """
        self._model, self._variables, self._mesh = model, variables, mesh
        self._devices = mesh.size if mesh is not None else 1
        pixels, activation = math.prod(model.image_shape[:2]), max(1, model.activation_size)
        size = batch_size or self._devices * max(1, min(PIXELS_AT_ONCE // pixels, ACTIVATIONS_AT_ONCE // activation))
        self.batch_size = -(-size // self._devices) * self._devices
        self.code_shape, self.code_size = model.code_shape, math.prod(model.code_shape)
        self.detail_shapes = model.detail_shapes
        self.detail_size = sum(map(math.prod, model.detail_shapes))

    def encode(self, images: Shaped[np.ndarray, "n h w c"]) -> Encoded:
        """The posteriors of images, uint8 or in [0, 1]."""
        parts = list(self.map_stream(encode, self.batches(images)))
        return Encoded(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    def decode(self, codes: Float[np.ndarray, "n z"]) -> UInt8[np.ndarray, "n h w c"]:
        """Pixels of codes."""
        return np.concatenate(list(self.decode_stream(self.batches(codes))))

    def reconstruct(self, images: Shaped[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
        """Pixels of the reconstructions from the means of the posteriors."""
        return np.concatenate(list(self.reconstruct_stream(self.batches(images))))

    def reconstruct_stream(self, batches: Iterable[np.ndarray]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """The reconstructions of batches of images, while the next ones compute."""
        return self.map_stream(reconstruct, batches)

    def decode_stream(self, batches: Iterable[Float[np.ndarray, "b z"]]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Pixels of batches of codes, each of at most `batch_size`, while the next ones compute."""
        return self.map_stream(decode, batches)

    def details(self, images: Shaped[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n d"]:
        """`Model.details` of images."""
        if not self.detail_size:
            return np.zeros((len(images), 0), np.float32)
        return np.concatenate(list(self.map_stream(details_of, self.batches(images))))

    def decode_detailed(self, batches: Iterable[Detailed]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Pixels of batches of codes and of the groups below them."""
        if not self.detail_size:
            return self.decode_stream(batch.codes for batch in batches)
        return self.map_stream(decode_detailed, batches)

    def decode_draws(
        self, codes: Iterable[Float[np.ndarray, "b z"]], *, seed: int, temperatures: Sequence[float]
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Pixels of batches of codes, with the groups below them drawn: the first row is number 0 of the seed."""
        if not self.detail_size:
            return self.decode_stream(codes)
        batches = numbered(codes, seed=seed, temperatures=temperatures)
        return self.map_stream(decode_draws, batches)

    def map_stream(self, function: Callable[[Model, Any, Any], Any], batches: Iterable[Any]) -> Iterator[Any]:
        """`function` of model, variables and each batch, while the next ones compute; it is compiled once.

        Args:
          function: must be row-wise: output row i depends on input row i only, since each device computes its rows.
          batches: arrays, or trees of them, of at most `batch_size` rows each.
        """
        compiled = _compiled(function, self._model, self._mesh)
        running: collections.deque[tuple[Any, int]] = collections.deque()
        for batch in batches:
            count = len(jax.tree.leaves(batch)[0])
            running.append((compiled(self._variables, jax.tree.map(self._padded, batch)), count))
            if len(running) >= BATCHES_IN_FLIGHT:
                yield _fetch(*running.popleft())
        while running:
            yield _fetch(*running.popleft())

    def batches(self, rows: Any) -> Iterator[Any]:
        """An array, or a tree of arrays, in pieces of `batch_size` rows; one empty piece if there are none."""
        for at in range(0, max(len(jax.tree.leaves(rows)[0]), 1), self.batch_size):
            yield jax.tree.map(lambda leaf, at=at: leaf[at : at + self.batch_size], rows)

    def _padded(self, batch: np.ndarray) -> np.ndarray:
        """The batch, and zeros up to the next power of two or the batch size: every shape is compiled once."""
        size = min(1 << max(len(batch) - 1, 0).bit_length(), self.batch_size)
        size = -(-size // self._devices) * self._devices
        return np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])


def numbered(
    codes: Iterable[Float[np.ndarray, "b z"]], *, seed: int, temperatures: Sequence[float], first: int = 0
) -> Iterator[Draws]:
    """Batches of codes with the numbers of their draws, from `first` on."""
    for batch in codes:
        count = len(batch)
        keys = random.keys_of(named_key(seed, "details"), np.arange(first, first + count))
        each = np.tile(np.asarray(temperatures, np.float32), (count, 1))
        yield Draws(batch, np.asarray(jax.random.key_data(keys)), each)
        first += count


def _fetch(result: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], result)


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], model: Model, mesh: Mesh | None) -> Callable[..., Any]:
    """`function` of variables and a batch, jitted, each device with its part of the batch."""
    run: Callable[..., Any] = functools.partial(function, model)
    if mesh is None:
        return jax.jit(run)
    whole, cut = PartitionSpec(), PartitionSpec(mesh.axis_names[0])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(whole, cut), out_specs=cut, check_vma=False)
    return jax.jit(sharded, in_shardings=(NamedSharding(mesh, whole), NamedSharding(mesh, cut)))
