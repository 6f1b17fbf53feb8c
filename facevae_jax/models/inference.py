"""A trained model on arrays of any length: batches of few shapes, on one device or on all of them."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Shaped, UInt8

from facevae_jax.models.vae import VAE, Posterior, to_pixels

PIXELS_AT_ONCE = 64 * 128**2  # of a batch on one device: 256 images of 64x64, 64 of 128x128, one of 1024x1024
BATCHES_IN_FLIGHT = 2  # one computes while what the other gave is fetched and used


def encode(model: VAE, variables: Any, images: jax.Array) -> Posterior:
    """The posterior of images, uint8 or in [0, 1]."""
    posterior: Any = model.apply(variables, images, method="encode")
    return posterior


def decode(model: VAE, variables: Any, latents: jax.Array) -> jax.Array:
    """Pixels of latents."""
    decoded: Any = model.apply(variables, latents, method="decode")
    return to_pixels(decoded)


def reconstruct(model: VAE, variables: Any, images: jax.Array) -> jax.Array:
    """Pixels of the reconstructions from the posteriors' means."""
    return decode(model, variables, encode(model, variables, images).mean)


class Encoded(NamedTuple):
    """A `Posterior` in the host's memory."""

    mean: Float32[np.ndarray, "n z"]
    log_variance: Float32[np.ndarray, "n z"]


class Inference:
    """Encodes and decodes numpy arrays with one model."""

    def __init__(self, model: VAE, variables: Any, mesh: Mesh | None = None, *, batch_size: int = 0) -> None:
        """Compiles as it is asked.

        Args:
          model: the network.
          variables: its parameters and batch statistics, on all devices of the mesh.
          mesh: over whose first axis a batch is cut; None: the default device alone.
          batch_size: images at a time, at most; 0: `PIXELS_AT_ONCE` on each device.
        """
        self._model, self._variables, self._mesh = model, variables, mesh
        self._devices = mesh.size if mesh is not None else 1
        size = batch_size or self._devices * max(1, PIXELS_AT_ONCE // model.resolution**2)
        self.batch_size = -(-size // self._devices) * self._devices
        self._encode, self._decode, self._reconstruct = (
            _compiled(function, model, mesh) for function in (encode, decode, reconstruct)
        )

    def encode(self, images: Shaped[np.ndarray, "n h w c"]) -> Encoded:
        """The posteriors of images, uint8 or in [0, 1]."""
        parts = list(self._stream(self._encode, self._cut(images)))
        return Encoded(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    def decode(self, latents: Float[np.ndarray, "n z"]) -> UInt8[np.ndarray, "n h w c"]:
        """Pixels of latents."""
        return np.concatenate(list(self._stream(self._decode, self._cut(latents))))

    def reconstruct(self, images: Shaped[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
        """Pixels of the reconstructions from the posteriors' means."""
        return np.concatenate(list(self._stream(self._reconstruct, self._cut(images))))

    def decode_stream(self, batches: Iterable[Float[np.ndarray, "b z"]]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Pixels of batches of latents, each of at most `batch_size`, while the next ones compute."""
        return self._stream(self._decode, batches)

    def encode_stream(self, batches: Iterable[Shaped[np.ndarray, "b h w c"]]) -> Iterator[Encoded]:
        """Posteriors of batches of images, each of at most `batch_size`, while the next ones compute."""
        return self._stream(self._encode, batches)

    def map_stream(self, function: Callable[[VAE, Any, Any], Any], batches: Iterable[Any]) -> Iterator[Any]:
        """`function` of model, variables and each batch, while the next ones compute; it is compiled once.

        Args:
          function: what it gives has a row for each row of the batch, which it does not mix: each device computes its
            part of them.
          batches: arrays, or trees of them, of at most `batch_size` rows each.
        """
        return self._stream(_compiled(function, self._model, self._mesh), batches)

    def _cut(self, inputs: np.ndarray) -> Iterator[np.ndarray]:
        for at in range(0, max(len(inputs), 1), self.batch_size):
            yield inputs[at : at + self.batch_size]

    def _stream(self, function: Callable[..., Any], batches: Iterable[Any]) -> Iterator[Any]:
        running: collections.deque[tuple[Any, int]] = collections.deque()
        for batch in batches:
            count = len(jax.tree.leaves(batch)[0])
            running.append((function(self._variables, jax.tree.map(self._padded, batch)), count))
            if len(running) >= BATCHES_IN_FLIGHT:
                yield _fetch(*running.popleft())
        while running:
            yield _fetch(*running.popleft())

    def _padded(self, batch: np.ndarray) -> np.ndarray:
        """The batch, and zeros up to the next power of two or the batch size: every shape is compiled once."""
        size = min(1 << max(len(batch) - 1, 0).bit_length(), self.batch_size)
        size = -(-size // self._devices) * self._devices
        return np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])


def _fetch(result: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], result)


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], model: VAE, mesh: Mesh | None) -> Callable[..., Any]:
    """`function` of variables and a batch, jitted, each device with its part of the batch."""
    run: Callable[..., Any] = functools.partial(function, model)
    if mesh is None:
        return jax.jit(run)
    whole, cut = PartitionSpec(), PartitionSpec(mesh.axis_names[0])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(whole, cut), out_specs=cut, check_vma=False)
    return jax.jit(sharded, in_shardings=(NamedSharding(mesh, whole), NamedSharding(mesh, cut)))
