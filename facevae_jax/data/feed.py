"""From rows to images on the device: resident, sharded or streamed, with the same batches, bit for bit."""

import collections
import concurrent.futures
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int, Shaped, UInt8

from facevae_jax.data.batches import Chunk
from facevae_jax.data.exchange import Routes, make_routes, send_capacity
from facevae_jax.data.plan import BatchPlan, padded_rows
from facevae_jax.data.store import gather_rows

LANES = 128  # of a TPU's vectors: uint8 [N, l, 128] has no padding there, and rows are gathered from it as they lie
MAX_CHUNK_BYTES = 256 * 2**20  # of streamed pixels in one dispatch
MAX_CHUNK_STEPS_ON_CPU = 4  # a CPU's steps are long, and a dispatch copies its whole chunk, used or not
MAX_MAPPED_BYTES_ON_CPU = 2 * 2**30  # more would crowd out other memory, and streaming is as fast
PREFETCHED_CHUNKS = 2  # on the device, beside the one that is trained on

Kind = Literal["resident", "sharded", "streamed"]


class FeedSpec(NamedTuple):
    """All that a feed is but its pixels: what a program is compiled for."""

    kind: Kind
    plan: BatchPlan
    image_shape: tuple[int, ...]
    mesh: Mesh  # of one axis, which cuts the batch and, of a sharded feed, the split
    capacity: int  # batches of a dispatch
    parts: int = 1  # of a batch, which is filled up so that each can be cut

    @classmethod
    def of(
        cls, kind: Kind, plan: BatchPlan, image_shape: tuple[int, ...], mesh: Mesh, *, capacity: int, parts: int = 1
    ) -> "FeedSpec":
        """With as many batches in a dispatch as the kind allows, `capacity` at the most."""
        if kind == "streamed":
            if mesh.devices.flat[0].platform == "cpu":
                capacity = min(capacity, MAX_CHUNK_STEPS_ON_CPU)
            capacity = max(1, min(capacity, MAX_CHUNK_BYTES // (plan.batch_size * math.prod(image_shape))))
        return cls(kind, plan, image_shape, mesh, capacity, parts)

    @property
    def whole(self) -> Sharding:
        """Of what every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def images_cut(self) -> Sharding:
        """Of arrays [images, ...]."""
        return NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names))

    @property
    def batches_cut(self) -> Sharding:
        """Of arrays [batches, images, ...]."""
        return NamedSharding(self.mesh, PartitionSpec(None, *self.mesh.axis_names))

    @property
    def slice_size(self) -> int:
        """Images of a device's slice."""
        return -(-self.plan.images // self.mesh.size)

    @property
    def batch_images(self) -> int:
        """Images of a batch with its padding."""
        part = self.plan.batch_size // self.parts
        return (part + -part % self.mesh.size) * self.parts

    def abstract_chunk(self) -> Chunk:
        """Shapes, dtypes and shardings of the chunks, to compile for."""

        def abstract(sharding: Sharding, dtype: type, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        image, steps, devices, batch = packed_shape(self.image_shape), self.capacity, self.mesh.size, self.batch_images
        rows = abstract(self.batches_cut, np.int32, steps, batch)
        if self.kind == "streamed":
            return Chunk((abstract(self.images_cut, np.uint8, batch, *image),) * steps, rows)
        if self.kind == "resident":
            return Chunk(abstract(self.whole, np.uint8, self.plan.images, *image), rows)
        room = send_capacity(batch // devices)
        shapes = Routes((steps, devices, room), (steps, devices, 4, devices), (steps, batch))
        routes = Routes(*(abstract(self.batches_cut, np.int32, *shape) for shape in shapes))
        return Chunk(abstract(self.images_cut, np.uint8, self.slice_size * devices, *image), rows, routes)

    def rows(self, first: int, count: int) -> Int[np.ndarray, "k b"]:
        """Rows of `count` batches from number `first` on, with padding; the remaining batches of a chunk are row 0."""
        rows = np.zeros((self.capacity, self.batch_images), np.int32)
        rows[:count] = padded_rows(self.plan.rows(first, count), parts=self.parts, devices=self.mesh.size)
        return rows


class ResidentFeed:
    """The split is in device memory, whole on each device or a slice on each; only row numbers are sent.

    If each device has a slice, the devices exchange the uint8 pixels of each batch, never of the split.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "n r r 3"], spec: FeedSpec) -> None:
        """Copies `pixels` to the devices."""
        self.spec = spec
        self._pixels = put(packed(pixels), spec.whole) if spec.kind == "resident" else _put_slices(packed(pixels), spec)

    def chunk(self, first: int, count: int) -> Chunk:
        """`count` batches of the plan from number `first` on, of `spec.capacity` at the most; call it in order."""
        spec, routes = self.spec, None
        rows = spec.rows(first, count)
        if spec.kind == "sharded":
            found = make_routes(rows[:count], devices=spec.mesh.size, slice_size=spec.slice_size)
            missing = spec.capacity - count
            padded = (np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) for array in found)
            routes = Routes(*(put(array, spec.batches_cut) for array in padded))
        return Chunk(self._pixels, put(rows, spec.batches_cut), routes)

    def close(self) -> None:
        """Ends threads; the feed cannot be used afterwards."""


def put(array: np.ndarray, sharding: Sharding) -> Array:
    """An array that all processes have, on the devices; each process sends the parts of its own devices.

    On a CPU an array in whole is not copied, so that a memory map stays one.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_rows(
    pixels: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " b"], sharding: Sharding
) -> Shaped[Array, "b ..."]:
    """Rows of a store, on the devices; each process reads the rows of its own devices."""
    shape = (len(rows), *pixels.shape[1:])

    def part(index: Any) -> np.ndarray:
        return gather_rows(pixels, rows[index[0]])

    return jax.make_array_from_callback(shape, sharding, part)


def packed_shape(image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Of an image on the device: rows of `LANES` numbers, or shorter ones where these do not divide it."""
    size = math.prod(image_shape)
    lanes = math.gcd(size, LANES)
    return size // lanes, lanes


def packed(pixels: UInt8[np.ndarray, "n r r 3"]) -> UInt8[np.ndarray, "n l lanes"]:
    """The same bytes in the shape for the device."""
    return np.asarray(pixels).reshape(len(pixels), *packed_shape(pixels.shape[1:]))


def _put_slices(pixels: UInt8[np.ndarray, "n l lanes"], spec: FeedSpec) -> UInt8[Array, "m l lanes"]:
    """A slice on each device; black images, which no plan asks for, fill up the last."""
    shape = (spec.slice_size * spec.mesh.size, *pixels.shape[1:])

    def part(index: Any) -> np.ndarray:
        held = pixels[index]
        missing = spec.slice_size - len(held)
        return np.pad(held, ((0, missing), (0, 0), (0, 0))) if missing else held

    return jax.make_array_from_callback(shape, spec.images_cut, part)


class StreamedFeed:
    """A thread gathers the next batches from the memory-mapped store and sends them while the device computes."""

    def __init__(self, pixels: UInt8[np.ndarray, "n r r 3"], spec: FeedSpec, *, first: int) -> None:
        """Starts gathering at batch `first`."""
        self.spec = spec
        self._pixels = pixels.reshape(len(pixels), *packed_shape(spec.image_shape))  # a memory map stays one
        self._next = first
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: collections.deque[concurrent.futures.Future[Array]] = collections.deque()
        for number in range(first, first + PREFETCHED_CHUNKS * spec.capacity):
            self._prefetch(number)

    def _prefetch(self, number: int) -> None:
        def gather() -> Array:
            return put_rows(self._pixels, np.maximum(self.spec.rows(number, 1)[0], 0), self.spec.images_cut)

        self._coming.append(self._executor.submit(gather))

    def chunk(self, first: int, count: int) -> Chunk:  # noqa: D102
        if first != self._next:
            raise ValueError(f"the streamed feed is at batch {self._next}, not {first}")
        capacity, batches = self.spec.capacity, list[Array]()
        for _ in range(count):
            batches.append(self._coming.popleft().result())  # raises what was raised in the thread
            self._prefetch(self._next + PREFETCHED_CHUNKS * capacity)
            self._next += 1
        rows = put(self.spec.rows(first, count), self.spec.batches_cut)
        return Chunk((*batches, *batches[-1:] * (capacity - count)), rows)

    def close(self) -> None:  # noqa: D102
        self._executor.shutdown(cancel_futures=True)


Feed = ResidentFeed | StreamedFeed  # where a dispatch gets its batches from


def device_memory_budget() -> int:
    """Bytes of one device that a split may take: half of what is free, since the step needs memory too.

    The devices of a CPU share the machine's memory, and one map of a split that all of them have whole.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    budget = psutil.virtual_memory().available // 2
    if jax.default_backend() == "cpu":
        return min(budget, MAX_MAPPED_BYTES_ON_CPU)
    return budget // jax.local_device_count()
