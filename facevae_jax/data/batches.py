"""From rows to images on the device: resident, sharded or streamed; all give the same batches, bit for bit."""

import mmap
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Sharding
from jaxtyping import Array, Int, UInt8

from facevae_jax.data.plan import BatchPlan

MAX_CHUNK_BYTES = 256 * 2**20  # of streamed pixels in one dispatch
MAX_CHUNK_STEPS_ON_CPU = 4  # a CPU's steps are long, and a dispatch copies its whole chunk, used or not
MAX_MAPPED_BYTES_ON_CPU = 2 * 2**30  # more would crowd out the machine's other memory, for a speed that streaming has
PREFETCHED_CHUNKS = 2  # on the device, beside the one that is trained on


class Batch(NamedTuple):
    """Images, and which rows of their split they are."""

    images: UInt8[Array, "b h w c"]
    rows: Int[Array, " b"]


class Chunk(NamedTuple):
    """The batches of one dispatch, on the device."""

    pixels: UInt8[Array, "n h w c"] | tuple[UInt8[Array, "b h w c"], ...]  # the whole split, or the batches themselves
    rows: Int[Array, "k b"]  # rows of each batch in the split


def batch_reader(chunk: Chunk) -> Callable[[Array | int], Batch]:
    """A function from a batch's number in the chunk to the batch, to use inside one compiled function."""
    pixels, rows = chunk
    if not isinstance(pixels, tuple):
        return lambda index: Batch(pixels[rows[index]], rows[index])
    batches = jnp.stack(pixels)
    return lambda index: Batch(batches[index], rows[index])


def _abstract(shape: tuple[int, ...], dtype: np.dtype | type, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class Feed(Protocol):
    """Where a dispatch gets its batches."""

    capacity: int  # batches of a chunk, in whole steps; a shorter dispatch leaves the rest unused

    def abstract_chunk(self) -> Chunk:
        """Shapes, dtypes and shardings of what `chunk` gives, to compile for."""
        ...

    def chunk(self, first: int, count: int) -> Chunk:
        """`count` batches of the plan from number `first` on; they are asked for in order."""
        ...

    def close(self) -> None:
        """Frees threads; the feed is not used again."""
        ...


class ResidentFeed:
    """The split lives in device memory, whole on each device or a slice on each; only row numbers travel.

    Where each device has a slice, it gives what it has of a batch and they exchange the rest: of each batch's uint8
    pixels, never of the split.
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

    def abstract_chunk(self) -> Chunk:  # noqa: D102
        rows = _abstract((self.capacity, self._plan.batch_size), np.int32, self._rows_sharding)
        return Chunk(_abstract(self._pixels.shape, self._pixels.dtype, self._pixels.sharding), rows)

    def chunk(self, first: int, count: int) -> Chunk:  # noqa: D102
        return Chunk(self._pixels, _put_plan(self._plan, first, count, self.capacity, self._rows_sharding))

    def close(self) -> None:  # noqa: D102
        pass


def put(array: np.ndarray, sharding: Sharding) -> Array:
    """An array that all processes have on the devices, of which each process sends its own devices' parts."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_rows(
    pixels: UInt8[np.ndarray, "n h w c"], rows: Int[np.ndarray, " b"], sharding: Sharding
) -> UInt8[Array, "b h w c"]:
    """Rows of a store on the devices, of which each process reads those for its own devices."""
    shape = (len(rows), *pixels.shape[1:])

    def part(index: Any) -> np.ndarray:
        return gather_rows(pixels, rows[index[0]])

    return jax.make_array_from_callback(shape, sharding, part)


def _put_split(pixels: np.ndarray, sharding: Sharding) -> UInt8[Array, "n h w c"]:
    """The pixels on the devices; black images fill up the last slice, which no plan asks for."""
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
    """A thread gathers the coming batches from the memory-mapped store, and sends them, while the device computes."""

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
        steps = max(1, min(capacity, MAX_CHUNK_BYTES // batch_bytes) // plan.parts)
        self.capacity = steps * plan.parts
        self._shape = (plan.batch_size, *pixels.shape[1:])
        self._pixels = pixels
        self._plan = plan
        self._sharding = batch_sharding
        self._rows_sharding = rows_sharding
        self._next = first
        self._queue: queue.Queue[jax.Array | Exception] = queue.Queue(PREFETCHED_CHUNKS * self.capacity)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._gather, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def _gather(self, number: int) -> None:
        while not self._closed.is_set():
            item: jax.Array | Exception
            try:
                item = put_rows(self._pixels, self._plan.rows(number)[0], self._sharding)
            except Exception as error:  # it is raised where the batch is asked for
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            number += 1

    def abstract_chunk(self) -> Chunk:  # noqa: D102
        rows = _abstract((self.capacity, self._plan.batch_size), np.int32, self._rows_sharding)
        return Chunk((_abstract(self._shape, np.uint8, self._sharding),) * self.capacity, rows)

    def chunk(self, first: int, count: int) -> Chunk:  # noqa: D102
        if first != self._next:
            raise ValueError(f"the streamed feed is at batch {self._next}, not {first}")
        batches: list[jax.Array] = []
        for _ in range(count):
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            batches.append(item)
        self._next += count
        rows = _put_plan(self._plan, first, count, self.capacity, self._rows_sharding)
        return Chunk((*batches, *batches[-1:] * (self.capacity - count)), rows)

    def close(self) -> None:  # noqa: D102
        self._closed.set()
        self._thread.join()


def gather_rows(pixels: UInt8[np.ndarray, "n h w c"], rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
    """A copy of some rows of a store, whose pages are then unmapped; they stay in the system's page cache.

    Otherwise the process would seem to grow to the size of the store, and be the first to go where memory is short.
    """
    images = np.asarray(pixels[rows])
    mapped = getattr(pixels, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return images


def free_device_memory() -> int:
    """Bytes that one device has free; devices that report nothing (CPU) divide the machine's memory among them."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // jax.local_device_count()


def device_memory_budget() -> int:
    """Bytes of one device that a split may take: half of what is free, since the step needs the rest."""
    budget = free_device_memory() // 2
    if jax.default_backend() == "cpu":
        budget = min(budget, MAX_MAPPED_BYTES_ON_CPU // jax.local_device_count())
    return budget
