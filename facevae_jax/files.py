"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO


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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
