"""Files on this machine and on object stores, written so that they are whole or absent."""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from facevae_jax.errors import UserError, expand_home

COPY_BYTES = 2**22  # at a time


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def location(path: str | os.PathLike[str], *, name: str = "--data_dir") -> pathlib.Path:
    """A path on this machine; of a URL an `etils.epath.Path`, which has the same methods.

    Args:
      path: as the user typed it.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the URL is of an unknown kind, or the home directory is unknown.
    """
    if not is_remote(path):
        return expand_home(path, name=name)
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(
            f"{name}={str(path)!r}: the scheme {error.args[0]} is not known: use gs://, s3://, az:// or a local folder."
        ) from error


@contextlib.contextmanager
def written_aside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the name of a local file, which becomes `target` only when the block ends without an error.

    Several may write the same target: the last that is whole counts. On this machine the file is renamed. An object
    store has no use for renaming: there an object appears when its upload is through.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="facevae-") as folder:
            local = pathlib.Path(folder, target.name)
            yield local
            with local.open("rb") as file, target.open("wb") as upload:
                shutil.copyfileobj(file, upload, COPY_BYTES)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
