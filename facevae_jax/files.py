"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator
from typing import Any, BinaryIO

from absl import logging

# What a file system that keeps no locks answers.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path` only when the block ends without an error.

    A reader never sees half a file, and a crash leaves the previous version in place.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with aside.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool) -> Iterator[None]:
    """Holds the lock `path` for this process; the system frees it when the process ends, however it ends.

    On a file system without locks it warns and holds none.

    Raises:
      BlockingIOError: another process has it, and `wait` is False; its message is that process's note of who it is.
    """
    with open(path, "a+") as file:  # noqa: PTH123 - a mode that neither truncates nor needs the file
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(error.errno, file.read().strip()) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning("%s: this file system keeps no locks; nothing stops a second run here", path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
