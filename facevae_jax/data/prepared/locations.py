"""Folders on this machine and in object stores."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from facevae_jax.core.errors import UserError, expand_home, make_writable_directory
from facevae_jax.core.files import AnyPath, reason, replacing

LIBRARIES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}  # by the scheme of the URL


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def location(path: str | os.PathLike[str], *, name: str) -> AnyPath:
    """The folder or URL that the user typed for the flag or key `name`. Raises UserError: its kind is unknown."""
    if not is_remote(path):
        return expand_home(path, name=name)
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError as error:
        known = ", ".join(f"{scheme}://" for scheme in LIBRARIES)
        raise UserError(f"{name}={str(path)!r}: use a local folder or one of {known}.") from error


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str], *, name: str) -> Iterator[None]:
    """Raises a UserError about a folder or URL for whatever an object store's library raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        library = LIBRARIES.get(os.fspath(path).partition("://")[0], "fsspec")
        missing = isinstance(error, ImportError)
        remedy = f"pip install {library}" if missing else "check its name, the network, your rights"
        raise UserError(f"{name}={str(path)!r} cannot be used ({reason(error)}): {remedy}.") from error


def make_writable(folder: AnyPath, path: str | os.PathLike[str], *, name: str) -> None:
    """Creates `folder`, which is below `path`. Raises UserError, before hours of work: it cannot be written to."""
    if not is_remote(folder):
        make_writable_directory(folder, name=name)
        return
    probe = folder / f"writable-{os.getpid()}"
    with reaching(path, name=name):
        probe.write_bytes(b"")
        probe.unlink()


@contextlib.contextmanager
def uploading(target: AnyPath) -> Iterator[AnyPath]:
    """Yields the name of a local file, which becomes `target` only if the block ends without an error.

    On this machine this is `files.replacing`. An object store does not need renaming: an object appears when its upload
    is complete.
    """
    if not is_remote(target):
        with replacing(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="facevae-") as folder:
        local = pathlib.Path(folder, target.name)
        yield local
        with local.open("rb") as file, target.open("wb") as upload:
            shutil.copyfileobj(file, upload, 2**22)
