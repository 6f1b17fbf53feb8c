"""The pixel store: a split decoded once to uint8 [N, R, R, 3] in a memory-mapped `.npy` file.

Beside each `train.npy` is a `train.json` with its checksum; it is written last, so a store without one is made again
from the dataset. A store that no longer agrees with its checksum is refused.
"""

import contextlib
import hashlib
import json
import math
import mmap
import pathlib
import shutil
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from facevae_jax.core.errors import UserError, make_writable_directory
from facevae_jax.core.files import atomic_writer, locked, reason, write_json
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.settings import CHANNELS

OTHER_BYTES = "has other bytes than were written"


def open_store(
    path: pathlib.Path,
    size: tuple[int, int],
    images: Callable[[], Iterable[np.ndarray]],
    *,
    verb: str,
    elsewhere: Callable[[], pathlib.Path] | None = None,
) -> UInt8[np.ndarray, "n r r 3"]:
    """The `.npy` store of `size` (images, R) at `path`, memory-mapped; made if it is missing.

    `images` returns uint8 arrays [k, R, R, 3] in row order; the progress bar shows `verb`. Where the folder of `path`
    cannot be written to, as that of another user's data, the store is `elsewhere`.

    Raises UserError: the store is damaged, or there is no room for one.
    """
    count, resolution = size
    shape = (count, resolution, resolution, CHANNELS)
    if not _is_whole(path, shape):
        try:
            make_writable_directory(path.parent, name="config.data.data_dir")
        except UserError:
            if elsewhere is None:
                raise
            path = elsewhere()
            make_writable_directory(path.parent, name="config.data.cache_dir")
    if not _is_whole(path, shape):
        with locked(path.with_suffix(".lock"), wait=True):  # one process makes it, the others wait
            if not _is_whole(path, shape):
                _write_store(path, shape, images(), verb=verb)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write_store(path: pathlib.Path, shape: tuple[int, ...], images: Iterable[np.ndarray], *, verb: str) -> None:
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"config.data.data_dir: {path} takes {needed / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB are free: "
            "choose another --config.data.data_dir or a smaller --config.data.resolution."
        )
    digest, rows = hashlib.sha256(), 0
    try:
        with atomic_writer(path) as file, progress_bar(total=shape[0], description=f"{verb} {path.stem}") as progress:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in images:
                data = np.ascontiguousarray(block).tobytes()
                digest.update(data)
                file.write(data)
                rows += len(block)
                progress.update(len(block))
            if rows != shape[0]:
                raise UserError(f"{path} needs {shape[0]} images, not {rows}: prepare the dataset again.")
        _write_record(path, shape, digest.hexdigest())
    except OSError as error:
        raise UserError(f"config.data.data_dir: {path} cannot be written ({reason(error)}): choose another.") from error


def _write_record(path: pathlib.Path, shape: tuple[int, ...], sha256: str) -> None:
    status = path.stat()
    record = {"shape": list(shape), "sha256": sha256, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    write_json(path.with_suffix(".json"), record)


def _is_whole(path: pathlib.Path, shape: tuple[int, ...]) -> bool:
    """Whether there is a complete store of this shape.

    The bytes are read only if the file's size or time differ from the record, so a run starts without reading them.

    Raises UserError: there is one, but it does not have the bytes that were written.
    """
    try:
        status = path.stat()
        record = json.loads(path.with_suffix(".json").read_text())
        if record["shape"] != list(shape):
            return False
        if (record["bytes"], record["modified_ns"]) == (status.st_size, status.st_mtime_ns):
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):  # the record is damaged, which `damage` finds too
        record = {}
    if damage(path, shape):
        raise UserError(f"{path} is damaged: delete it, and it is made again; first find out why (the disk?).")
    with contextlib.suppress(OSError):  # of another user
        _write_record(path, shape, record["sha256"])
    return True


def damage(path: pathlib.Path, shape: tuple[int, ...]) -> str:
    """What is wrong with the store at `path`, of which every byte is read; empty if it is whole."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        if not pixels.shape == shape == tuple(record["shape"]):
            return f"has the shape {list(pixels.shape)}, recorded as {record['shape']}, not {list(shape)}"
        digest = hashlib.sha256()
        for image in np.asarray(pixels):  # not all at once, which no signal would interrupt
            digest.update(image.tobytes())
        return "" if digest.hexdigest() == record["sha256"] else OTHER_BYTES
    except Exception as error:  # numpy raises many kinds for a damaged header
        return f"cannot be read ({reason(error)})"


def gather_rows(pixels: Shaped[np.ndarray, "n ..."], rows: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, "b ..."]:
    """A copy of some rows of a store, whose pages are then unmapped; they stay in the system's page cache.

    Otherwise the process would seem to grow to the size of the store, and be the first to be killed if memory is short.
    """
    images = np.asarray(pixels[rows])
    mapped = getattr(pixels, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return images
