"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
from collections.abc import Iterator
from typing import Any, BinaryIO

from absl import logging

from facevae_jax.core.errors import FULL

AnyPath = pathlib.Path | Any  # on this machine, or the `etils.epath.Path` of a URL, which has the same methods

# Errors of a file system that does not support locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`, at which the block makes a file or a folder.

    When the block ends without an error, its files are flushed to the disk and it takes the name `path`; otherwise it
    is deleted. A file, or an empty folder, that has the name is replaced. A reader never sees half of it, and a crash
    leaves the previous version in place. Of several writers the last counts.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in FULL and error.filename is None:  # a write's error does not say which file
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path` only if the block ends without an error; see `replacing`."""
    with replacing(path) as temporary, temporary.open("w+b") as file:
        yield file


class LockedError(BlockingIOError):
    """Another process has a lock; `strerror` says which."""


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool) -> Iterator[None]:
    """Holds the lock `path` for this process; the system frees it when the process ends, however it ends.

    On a file system without locks it warns and holds none.

    Raises:
      LockedError: another process has it, and `wait` is False.
    """
    with open(path, "a+") as file:  # noqa: PTH123 - a mode that neither truncates nor needs the file
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise LockedError(error.errno, file.read().strip()) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning("%s: this file system has no locks; nothing stops a second run here", path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def file_sha256(path: AnyPath) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What an exception says, on one line; for the system's errors, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
