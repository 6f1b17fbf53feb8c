"""Where images are read from: a folder, or a .zip file that is not unpacked."""

import collections
import contextlib
import errno
import functools
import os
import pathlib
import stat
import zipfile
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from facevae_jax.core.errors import UserError, describe_entries, some
from facevae_jax.core.files import reason
from facevae_jax.data.sources.names import EXTENSIONS, canonical, is_debris, is_image, is_known_folder, what_it_is

MAX_WRAPPINGS = 32  # folders that are only inside of each other
MAX_FILE_BYTES = 2**29  # no picture of an accepted size is larger


@runtime_checkable
class Member(Protocol):
    """A file inside something else."""

    def read(self) -> bytes:
        """The file's bytes."""
        ...

    def stamp(self) -> tuple[int, ...]:
        """Numbers that change when the file does."""
        ...


File = pathlib.Path | Member


class ZipMember(NamedTuple):
    """One file in a .zip file."""

    archive: str
    name: str

    def read(self) -> bytes:
        """The file's bytes, verified against their checksum."""
        opened = _open_zip(self.archive)
        info = opened.getinfo(self.name)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError("a link inside an archive: put the file itself in")
        _check_file_size(info.file_size)
        try:
            return opened.read(info)
        except NotImplementedError as error:
            raise ValueError(_why_closed(info) or str(error)) from error

    def stamp(self) -> tuple[int, ...]:
        """Numbers that change when the file does."""
        info = _open_zip(self.archive).getinfo(self.name)
        return info.file_size, info.CRC, info.header_offset


def _why_closed(info: zipfile.ZipInfo) -> str:
    """Why Python cannot read a member, with the remedy; empty where it can."""
    if info.flag_bits & 0x1:
        return "encrypted: unpack the archive with its password"
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        return ""
    method = {9: "Deflate64", 93: "Zstandard", 98: "PPMd"}.get(info.compress_type, info.compress_type)
    return f"compressed by {method}: unpack the archive with 7z x"


def _name_of(info: zipfile.ZipInfo) -> str:
    """The name of a member: macOS and Info-ZIP write UTF-8 without saying so, and Python takes it for code page 437."""
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


@functools.lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file. Raises ValueError: it is too large, or not regular: a pipe, for example, would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    _check_file_size(status.st_size)
    return path.read_bytes()


def _check_file_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are over {MAX_FILE_BYTES}: no picture is that large")


class Folder:
    """A folder of the file system. Symbolic links are followed; names are relative paths, see `canonical`."""

    def __init__(self, path: pathlib.Path, *, notes: tuple[str, ...] = ()) -> None:
        """`path` is a folder, and `notes` are for the user, one line each."""
        self.path, self.notes = path, notes
        self._stored: dict[str, str] = {}  # names that are stored otherwise

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder, sorted and relative to it; none where there is no such folder.

        A folder that a link leads to has its own name where it is inside too, in whatever order the system lists them.

        Raises UserError: a folder cannot be read.
        """
        root = self.path / folder
        if not root.is_dir():
            return []
        found, visited = list[str](), set[str]()
        links, pending = list[str](), [""]
        while pending or links:
            if not pending:
                links.sort(reverse=True)
                pending.append(links.pop())
            prefix = pending.pop()
            identity = os.path.realpath(root / prefix)
            if identity in visited:  # a link to a folder above would never end
                continue
            visited.add(identity)
            try:
                entries = list(os.scandir(root / prefix))
            except OSError as error:
                raise UserError(
                    f"--source: {error.filename} cannot be read ({error.strerror}): make it readable, or move it away."
                ) from error
            for entry in entries:
                name = prefix + entry.name
                if not _is_folder(entry):
                    found.append(name)
                else:
                    (links if entry.is_symlink() else pending).append(f"{name}/")
        return sorted(self._canonical_names(found, f"{folder}/" if folder else ""))

    def _canonical_names(self, stored: list[str], prefix: str) -> list[str]:
        """Canonical names of stored ones, which are remembered; of two with one name the second keeps its own."""
        names = set(stored)
        result = []
        for name in sorted(stored):
            shown = canonical(name)
            if is_debris(shown):
                continue
            if shown != name and shown not in names:
                names.add(shown)
                self._stored[prefix + shown] = prefix + name
                name = shown
            result.append(name)
        return result

    def file(self, name: str) -> pathlib.Path:
        """Where the bytes of a file are."""
        return self.path / self._stored.get(name, name)

    def has_folder(self, name: str) -> bool:
        """Whether there is such a folder."""
        return (self.path / name).is_dir()

    def describe(self, folder: str = "") -> str:
        """What is in this folder, or in one below, in a few words."""
        try:
            entries = sorted(entry.name + "/" * _is_folder(entry) for entry in os.scandir(self.path / folder))
        except OSError as error:
            return f"found: nothing readable ({error.strerror})"
        return describe_entries(entries)

    def read(self, name: str) -> bytes | None:
        """The bytes of one file; None where there is no such file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return read_file(self.path / name)
        return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; a link that leads nowhere does not."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that is not to be read
        return False


class Archive:
    """A .zip file, with the methods of `Folder`. If everything is in one top folder, the names leave that out."""

    def __init__(self, path: pathlib.Path) -> None:
        """Raises UserError: the file cannot be read, or has a member that would be outside of it."""
        self.path = path
        try:
            members = [info for info in _open_zip(str(path)).infolist() if not info.is_dir()]
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(
                f"--source={str(path)!r} cannot be read ({what_it_is(path) or reason(error)}): give a folder, or a "
                ".zip file."
            ) from error
        closed = [_why_closed(info) for info in members if is_image(_name_of(info))]
        if closed and all(closed):  # a single one is reported when it is read
            raise UserError(f"--source={str(path)!r} is {closed[0]}.")
        named = {_safe_name(_name_of(info), path): info.filename for info in members}  # the last, as when unpacked
        self._stored = {name: other for name, other in named.items() if not is_debris(name)}
        repeated = len(members) - len(named)
        note = f"{repeated} files are in {path.name} more than once: the last of each counts."
        self.notes: tuple[str, ...] = (note,) if repeated else ()
        self._names = sorted(self._stored)
        self._top = ""  # what is left out of the names
        while self._names and (top := _only_folder(self._names)) and not is_known_folder(top):
            self._names = [name[len(top) + 1 :] for name in self._names]
            self._top += f"{top}/"

    def names(self, folder: str = "") -> list[str]:  # noqa: D102
        prefix = f"{folder}/" if folder else ""
        return [name[len(prefix) :] for name in self._names if name.startswith(prefix)]

    def file(self, name: str) -> ZipMember:  # noqa: D102
        return ZipMember(str(self.path), self._stored[self._top + name])

    def has_folder(self, name: str) -> bool:  # noqa: D102
        return bool(self.names(name))

    def describe(self, folder: str = "") -> str:  # noqa: D102
        return describe_entries(sorted({name.partition("/")[0] + "/" * ("/" in name) for name in self.names(folder)}))

    def read(self, name: str) -> bytes | None:  # noqa: D102
        return self.file(name).read() if self._top + name in self._stored else None


def _safe_name(stored: str, archive: pathlib.Path) -> str:
    """The name without `.` parts. Raises UserError: unpacked, it would be outside of the archive's folder."""
    parts = canonical(stored).split("/")
    if stored.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0].endswith(":")):
        raise UserError(f"--source={str(archive)!r}: the member {stored!a} would be outside of it: do not trust it.")
    return "/".join(part for part in parts if part not in ("", "."))


def _only_folder(names: Sequence[str]) -> str:
    """The folder that all of the sorted names begin with; empty if there is none."""
    top, slash, _ = names[0].partition("/")
    return top if slash and all(name.startswith(f"{top}/") for name in names) else ""


Source = Folder | Archive


class Listing(NamedTuple):
    """The files below one folder of a source."""

    source: Source
    folder: str
    names: Sequence[str]  # relative to the folder, sorted

    def file(self, row: int) -> File:
        """Where the bytes of `names[row]` are."""
        return self.source.file(f"{self.folder}/{self.names[row]}" if self.folder else self.names[row])

    @property
    def image_rows(self) -> Int64[np.ndarray, " n"]:
        """The rows that are images."""
        return np.flatnonzero(np.fromiter(map(is_image, self.names), bool, len(self.names)))

    @property
    def ignored_note(self) -> str:
        """A line on the files that are not images, by extension; empty where there are none."""
        others = collections.Counter(
            pathlib.PurePosixPath(name).suffix.lower() or "no extension" for name in self.names if not is_image(name)
        )
        if not others:
            return ""
        kinds = some(f"{count} {ascii(kind)[1:-1]}" for kind, count in others.most_common())
        images = ", ".join(EXTENSIONS)
        return f"{others.total()} other files were ignored ({kinds}): images are {images}, none hidden."


def list_files(source: Source, folder: str = "") -> Listing:
    """All files below a folder of a source, however deep."""
    return Listing(source, folder, source.names(folder))


def open_source(path: pathlib.Path) -> Source:
    """A folder or a .zip file. Raises UserError: there is none, or it cannot be read.

    Where a folder has nothing but another folder, that one is opened, as in a .zip file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"--source={str(path)!r} cannot be read ({error.strerror}): make it readable.") from error
        nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), pathlib.Path("/"))
        raise UserError(f"--source={str(path)!r} does not exist; {nearest} {Folder(nearest).describe()}.") from error
    if stat.S_ISDIR(mode):
        inmost = _inmost(path)
        note = f"the names of the images begin below {inmost}, which is all that the source has."
        return Folder(inmost, notes=(note,) if inmost != path else ())
    if stat.S_ISREG(mode):
        _open_zip.cache_clear()  # a file of this name may have been replaced since
        return Archive(path)
    raise UserError(f"--source={str(path)!r} is neither a folder nor a .zip file: give one of them.")


def _inmost(path: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the one that it only wraps, however deep."""
    for _ in range(MAX_WRAPPINGS):
        if is_known_folder(path.name):
            return path
        try:
            entries = [entry for entry in os.scandir(path) if not is_debris(entry.name)]
        except OSError:
            return path
        if not (len(entries) == 1 and _is_folder(entries[0]) and not entries[0].is_symlink()):
            return path
        if is_known_folder(entries[0].name):
            return path
        path = path / entries[0].name
    return path
