"""From rows to images on the device: resident, sharded or streamed, with the same batches, bit for bit."""

import collections
import concurrent.futures
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Sharding
from jaxtyping import Array, Int, Shaped

from facevae_jax.data.batches import Chunk
from facevae_jax.data.plan import BatchPlan
from facevae_jax.data.store import gather_rows

MAX_CHUNK_BYTES = 256 * 2**20  # of streamed pixels in one dispatch
MAX_CHUNK_STEPS_ON_CPU = 4  # a CPU's steps are long, and a dispatch copies its whole chunk, used or not
MAX_MAPPED_BYTES_ON_CPU = 2 * 2**30  # more would crowd out other memory, and streaming is as fast
PREFETCHED_CHUNKS = 2  # on the device, beside the one that is trained on


def _abstract(shape: tuple[int, ...], dtype: np.dtype | type, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class ResidentFeed:
    """The split is in device memory, whole on each device or a slice on each; only row numbers are sent.

    If each device has a slice, the devices exchange the uint8 pixels of each batch, never of the split.
    """

    def __init__(
        self, pixels: np.ndarray, plan: BatchPlan, *, capacity: int, pixels_sharding: Sharding, rows_sharding: Sharding
    ) -> None:
        """Copies `pixels` to the devices.

        Args:
          pixels: uint8 [N, R, R, 3].
          plan: of the rows.
          capacity: batches of a chunk.
          pixels_sharding: of `pixels`, whole or along N.
          rows_sharding: of row numbers [capacity, batch].
        """
        self.capacity = capacity
        self._plan = plan
        self._rows_sharding = rows_sharding
        self._pixels = _put_split(pixels, pixels_sharding)

    def abstract_chunk(self) -> Chunk:
        """Shapes, dtypes and shardings of what `chunk` returns, to compile for."""
        rows = _abstract((self.capacity, self._plan.batch_size), np.int32, self._rows_sharding)
        return Chunk(_abstract(self._pixels.shape, self._pixels.dtype, self._pixels.sharding), rows)

    def chunk(self, first: int, count: int) -> Chunk:
        """`count` batches of the plan from number `first` on, of `capacity` at the most; call it in order."""
        return Chunk(self._pixels, _put_plan(self._plan, first, count, self.capacity, self._rows_sharding))

    def close(self) -> None:
        """Ends threads; the feed cannot be used afterwards."""


def put(array: np.ndarray, sharding: Sharding) -> Array:
    """An array that all processes have, on the devices; each process sends the parts of its own devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_rows(
    pixels: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " b"], sharding: Sharding
) -> Shaped[Array, "b ..."]:
    """Rows of a store, on the devices; each process reads the rows of its own devices."""
    shape = (len(rows), *pixels.shape[1:])

    def part(index: Any) -> np.ndarray:
        return gather_rows(pixels, rows[index[0]])

    return jax.make_array_from_callback(shape, sharding, part)


def _put_split(pixels: Shaped[np.ndarray, "n ..."], sharding: Sharding) -> Shaped[Array, "m ..."]:
    """The pixels on the devices; black images, which no plan asks for, fill up the last slice."""
    if sharding.is_fully_replicated:
        return put(np.asarray(pixels), sharding)  # on a CPU this is the memory map itself, not a copy
    per_device = -(-len(pixels) // sharding.num_devices)
    shape = (per_device * sharding.num_devices, *pixels.shape[1:])

    def part(index: Any) -> np.ndarray:
        held = np.asarray(pixels[index])
        missing = per_device - len(held)
        return np.pad(held, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else held

    return jax.make_array_from_callback(shape, sharding, part)


def _put_plan(plan: BatchPlan, first: int, count: int, capacity: int, sharding: Sharding) -> Int[Array, "k b"]:
    rows = np.zeros((capacity, plan.batch_size), np.int32)
    rows[:count] = plan.rows(first, count)
    return put(rows, sharding)


class StreamedFeed:
    """A thread gathers the next batches from the memory-mapped store and sends them while the device computes."""

    def __init__(
        self,
        pixels: np.ndarray,
        plan: BatchPlan,
        *,
        capacity: int,
        first: int,
        batch_sharding: Sharding,
        rows_sharding: Sharding,
    ) -> None:
        """Starts gathering at batch `first`; the shardings are for [batch, h, w, c] and [capacity, batch]."""
        batch_bytes = plan.batch_size * int(np.prod(pixels.shape[1:]))
        if jax.default_backend() == "cpu":
            capacity = min(capacity, MAX_CHUNK_STEPS_ON_CPU)
        self.capacity = max(1, min(capacity, MAX_CHUNK_BYTES // batch_bytes))
        self._shape = (plan.batch_size, *pixels.shape[1:])
        self._pixels, self._plan = pixels, plan
        self._sharding, self._rows_sharding = batch_sharding, rows_sharding
        self._next = first
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: collections.deque[concurrent.futures.Future[Array]] = collections.deque()
        for number in range(first, first + PREFETCHED_CHUNKS * self.capacity):
            self._prefetch(number)

    def _prefetch(self, number: int) -> None:
        def gather() -> Array:
            return put_rows(self._pixels, self._plan.rows(number)[0], self._sharding)

        self._coming.append(self._executor.submit(gather))

    def abstract_chunk(self) -> Chunk:  # noqa: D102
        rows = _abstract((self.capacity, self._plan.batch_size), np.int32, self._rows_sharding)
        return Chunk((_abstract(self._shape, np.uint8, self._sharding),) * self.capacity, rows)

    def chunk(self, first: int, count: int) -> Chunk:  # noqa: D102
        if first != self._next:
            raise ValueError(f"the streamed feed is at batch {self._next}, not {first}")
        batches: list[Array] = []
        for _ in range(count):
            batches.append(self._coming.popleft().result())  # raises what was raised in the thread
            self._prefetch(self._next + PREFETCHED_CHUNKS * self.capacity)
            self._next += 1
        rows = _put_plan(self._plan, first, count, self.capacity, self._rows_sharding)
        return Chunk((*batches, *batches[-1:] * (self.capacity - count)), rows)

    def close(self) -> None:  # noqa: D102
        self._executor.shutdown(cancel_futures=True)


Feed = ResidentFeed | StreamedFeed  # where a dispatch gets its batches from


def device_memory_budget() -> int:
    """Bytes of one device that a split may take: half of what is free, since the step needs memory too.

    Devices that do not report memory (CPU) share that of the machine.
    """
    stats, devices = jax.local_devices()[0].memory_stats(), jax.local_device_count()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    budget = psutil.virtual_memory().available // devices // 2
    return min(budget, MAX_MAPPED_BYTES_ON_CPU // devices) if jax.default_backend() == "cpu" else budget
