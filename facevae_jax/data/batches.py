"""From (seed, step) to rows to images on the device, resident or streamed; there is no iterator state to save.

Epoch e of a split of N images is a permutation drawn from (seed, e), cut into N // batch_size batches; the images left
over are dropped for that epoch. Both feeds give the same batches, bit for bit.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Sharding
from jaxtyping import Array, Int, UInt8

from facevae_jax.random import named_key

MAX_CHUNK_BYTES = 256 * 2**20  # of streamed pixels in one dispatch
MAX_CHUNK_STEPS_ON_CPU = 4  # a CPU's steps are long, and a dispatch copies its whole chunk, used or not
PREFETCHED_CHUNKS = 2  # on the device, beside the one that is trained on


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass over the split."""
    return images // batch_size


@functools.lru_cache(maxsize=2)  # an epoch and, around its end, the next
def epoch_order(*, seed: int, epoch: int, images: int) -> Int[np.ndarray, " n"]:
    """The order of the rows in one epoch, computed on the CPU where jax has one: the device is left to training."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        device = None
    with jax.default_device(device):
        key = jax.random.fold_in(named_key(seed, "shuffle"), epoch)
        order = np.asarray(jax.random.permutation(key, images), np.int32)
    order.setflags(write=False)
    return order


def batch_rows(*, seed: int, step: int, images: int, batch_size: int) -> Int[np.ndarray, " b"]:
    """Rows of the global batch of a step; a pure function of its arguments."""
    epoch, position = divmod(step, steps_per_epoch(images, batch_size))
    order = epoch_order(seed=seed, epoch=epoch, images=images)
    return order[position * batch_size : (position + 1) * batch_size]


def evaluation_rows(*, images: int, batch_size: int) -> Iterator[tuple[Int[np.ndarray, " b"], np.ndarray]]:
    """Every row once, in order, in batches of one size: (rows, which of them are not padding)."""
    for start in range(0, images, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(rows, images - 1), rows < images


class Chunk(NamedTuple):
    """The batches of one dispatch, on the device."""

    pixels: UInt8[Array, "n h w c"] | tuple[UInt8[Array, "b h w c"], ...]  # the whole split, or the batches themselves
    rows: Int[Array, "k b"] | None  # rows of each batch in the split; None where `pixels` are the batches


def batch_reader(chunk: Chunk) -> Callable[[Array | int], UInt8[Array, "b h w c"]]:
    """A function from a batch's number in the chunk to its images, to use inside one compiled function."""
    pixels, rows = chunk
    if rows is not None:
        return lambda index: pixels[rows[index]]
    batches = jnp.stack(pixels)
    return lambda index: batches[index]


def _abstract(shape: tuple[int, ...], dtype: type, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class BatchPlan(NamedTuple):
    """What decides which rows a step sees."""

    seed: int
    images: int
    batch_size: int

    def rows(self, step: int) -> Int[np.ndarray, " b"]:
        """Rows of the batch of a step."""
        return batch_rows(seed=self.seed, step=step, images=self.images, batch_size=self.batch_size)


class Feed(Protocol):
    """Where a dispatch gets its batches."""

    capacity: int  # batches of a chunk; a shorter dispatch leaves the rest unused

    def abstract_chunk(self) -> Chunk:
        """Shapes, dtypes and shardings of what `chunk` gives, to compile for."""
        ...

    def chunk(self, step: int, count: int) -> Chunk:
        """The batches of steps `step` to `step + count - 1`; steps are asked for in order."""
        ...

    def close(self) -> None:
        """Frees threads; the feed is not used again."""
        ...


class ResidentFeed:
    """The split lives in device memory; only row numbers travel."""

    def __init__(
        self, pixels: np.ndarray, plan: BatchPlan, *, capacity: int, pixels_sharding: Sharding, rows_sharding: Sharding
    ) -> None:
        """Copies `pixels` to the device; `rows_sharding` is for [capacity, batch] row numbers."""
        self.capacity = capacity
        self._plan = plan
        self._rows_sharding = rows_sharding
        self._pixels = jax.device_put(np.asarray(pixels), pixels_sharding)

    def abstract_chunk(self) -> Chunk:  # noqa: D102
        rows = _abstract((self.capacity, self._plan.batch_size), np.int32, self._rows_sharding)
        return Chunk(_abstract(self._pixels.shape, np.uint8, self._pixels.sharding), rows)

    def chunk(self, step: int, count: int) -> Chunk:  # noqa: D102
        rows = np.zeros((self.capacity, self._plan.batch_size), np.int32)
        for index in range(count):
            rows[index] = self._plan.rows(step + index)
        return Chunk(self._pixels, jax.device_put(rows, self._rows_sharding))

    def close(self) -> None:  # noqa: D102
        pass


class StreamedFeed:
    """A thread gathers the coming batches from the memory-mapped store, and sends them, while the device computes."""

    def __init__(
        self, pixels: np.ndarray, plan: BatchPlan, *, capacity: int, first_step: int, batch_sharding: Sharding
    ) -> None:
        """Starts gathering at `first_step`; `batch_sharding` is for [batch, h, w, c]."""
        batch_bytes = plan.batch_size * int(np.prod(pixels.shape[1:]))
        if jax.default_backend() == "cpu":
            capacity = min(capacity, MAX_CHUNK_STEPS_ON_CPU)
        self.capacity = max(1, min(capacity, MAX_CHUNK_BYTES // batch_bytes))
        self._shape = (plan.batch_size, *pixels.shape[1:])
        self._pixels = pixels
        self._plan = plan
        self._sharding = batch_sharding
        self._next_step = first_step
        self._queue: queue.Queue[jax.Array | Exception] = queue.Queue(PREFETCHED_CHUNKS * self.capacity)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._gather, args=(first_step,), name="prefetch", daemon=True)
        self._thread.start()

    def _gather(self, step: int) -> None:
        while not self._closed.is_set():
            item: jax.Array | Exception
            try:
                item = jax.device_put(np.asarray(self._pixels[self._plan.rows(step)]), self._sharding)
            except Exception as error:  # it is raised where the batch is asked for
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            step += 1

    def abstract_chunk(self) -> Chunk:  # noqa: D102
        return Chunk((_abstract(self._shape, np.uint8, self._sharding),) * self.capacity, None)

    def chunk(self, step: int, count: int) -> Chunk:  # noqa: D102
        if step != self._next_step:
            raise ValueError(f"the streamed feed is at step {self._next_step}, not {step}")
        batches: list[jax.Array] = []
        for _ in range(count):
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            batches.append(item)
        self._next_step += count
        unused = self.capacity - count
        return Chunk((*batches, *batches[-1:] * unused), None)

    def close(self) -> None:  # noqa: D102
        self._closed.set()
        self._thread.join()


def device_memory_budget() -> int:
    """Bytes of one device that a split may take: half of what is free, since the step needs the rest.

    Devices that report nothing (CPU) share the machine's memory, of which half is divided among them.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    return psutil.virtual_memory().available // 2 // jax.local_device_count()
