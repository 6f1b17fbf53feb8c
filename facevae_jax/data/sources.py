"""Where images are read from: a folder, or a .zip or .tar file that is not unpacked."""

import collections
import itertools
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

from facevae_jax.data.archives import EXTENSIONS, Archive, TarMember, ZipMember, check_file_size
from facevae_jax.errors import UserError, describe_entries, some

FILES_LOOKED_AT = 1000


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file; of nothing that is no file, such as a pipe, which would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    check_file_size(status.st_size)
    return path.read_bytes()


class Listing(Protocol):
    """Files below one folder of a source."""

    @property
    def names(self) -> Sequence[str]:
        """Paths relative to that folder, with forward slashes, sorted."""
        ...

    def file(self, row: int) -> pathlib.Path | ZipMember | TarMember:
        """Where the bytes of `names[row]` are."""
        ...


class Source(Protocol):
    """A folder or an archive."""

    path: pathlib.Path
    notes: tuple[str, ...]  # what the user should know, a line each

    def has_folder(self, name: str) -> bool:
        """Whether there are files in this folder, given as a path relative to the source."""
        ...

    def files(self, folder: str = "") -> Listing:
        """All files below a folder, however deep; none where there is no such folder."""
        ...

    def read(self, name: str) -> bytes | None:
        """The bytes of one file; None where there is no such file."""
        ...

    def describe(self, folder: str = "") -> str:
        """What is in the source or one of its folders, in a few words."""
        ...

    def has_images(self) -> bool:
        """Whether there are images among the first files; for a hint, so it neither fails nor takes long."""
        ...


class FolderListing(NamedTuple):
    """Files below a folder of the file system."""

    root: pathlib.Path
    names: Sequence[str]

    def file(self, row: int) -> pathlib.Path:  # noqa: D102
        return self.root / self.names[row]


class Folder:
    """A folder of the file system. Symbolic links are followed."""

    def __init__(self, path: pathlib.Path) -> None:
        """`path` is a folder."""
        self.path = path
        self.notes: tuple[str, ...] = ()

    def has_folder(self, name: str) -> bool:  # noqa: D102
        return (self.path / name).is_dir()

    def files(self, folder: str = "") -> FolderListing:
        """All files below a folder, sorted.

        Raises:
          UserError: a folder cannot be read.
        """
        root = self.path / folder
        if not root.is_dir():
            return FolderListing(root, [])
        found, visited = [], set()

        def refuse(error: OSError) -> None:
            raise UserError(f"--source: {error.filename} cannot be read ({error.strerror}).") from error

        for current, folders, files in os.walk(root, followlinks=True, onerror=refuse):
            identity = os.path.realpath(current)
            if identity in visited:  # a link to a folder above would never end
                folders.clear()
                continue
            visited.add(identity)
            prefix = os.path.relpath(current, root).replace(os.sep, "/") + "/"
            found += files if prefix == "./" else [prefix + name for name in files]
        return FolderListing(root, sorted(found))

    def read(self, name: str) -> bytes | None:  # noqa: D102
        try:
            return read_file(self.path / name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def describe(self, folder: str = "") -> str:  # noqa: D102
        try:
            entries = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(self.path / folder))
        except OSError as error:
            return f"found: nothing readable ({error.strerror})"
        return describe_entries(entries)

    def has_images(self) -> bool:  # noqa: D102
        files = itertools.chain.from_iterable(files for _, _, files in os.walk(self.path))
        return any(map(is_image, itertools.islice(files, FILES_LOOKED_AT)))


def open_source(path: pathlib.Path) -> Source:
    """A folder, or a .zip or .tar file.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Archive(path)
    nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), pathlib.Path("/"))
    raise UserError(
        f"--source={str(path)!r} does not exist; {nearest} {Folder(nearest).describe()}: give the folder of the "
        "images, or a .zip or .tar file."
    )


def is_image(name: str) -> bool:
    """Whether a path is that of a PNG, JPEG or WebP file, none of whose folders is hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".") and "/." not in name


def image_rows(listing: Listing) -> Int64[np.ndarray, " n"]:
    """The rows of a listing that are images."""
    return np.flatnonzero(np.fromiter(map(is_image, listing.names), bool, len(listing.names)))


def ignored_note(listing: Listing) -> str:
    """A line on the files that are no images, by extension; empty where there are none."""
    others = collections.Counter(
        pathlib.PurePosixPath(name).suffix.lower() or "no extension" for name in listing.names if not is_image(name)
    )
    if not others:
        return ""
    kinds = some(f"{count} {ascii(kind)[1:-1]}" for kind, count in others.most_common())
    return f"{others.total()} other files were ignored ({kinds}): images are .png, .jpg, .jpeg and .webp, none hidden."
