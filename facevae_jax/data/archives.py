"""Images in .zip and .tar files, which are read without being unpacked."""

import array
import bisect
import functools
import itertools
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from facevae_jax.errors import UserError, describe_entries

LAYOUT_FOLDERS = ("thumbnails128x128", "images1024x1024", "img_align_celeba")  # which layouts know by their names
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILE_BYTES = 2**29  # no picture of a size that is accepted is larger


class ZipMember(NamedTuple):
    """One file in a .zip file."""

    archive: str
    name: str

    def read(self) -> bytes:
        """The file's bytes, which are compared with their checksum."""
        opened = _open_zip(self.archive)
        info = opened.getinfo(self.name)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError("a link inside an archive: put the file itself in")
        check_file_size(info.file_size)
        return opened.read(info)

    def stamp(self) -> tuple[int, ...]:
        """Changes where the file does."""
        info = _open_zip(self.archive).getinfo(self.name)
        return info.file_size, info.CRC, info.header_offset


class TarMember(NamedTuple):
    """One file in a .tar file."""

    archive: str
    offset: int  # of its bytes
    size: int  # below 0: it has none of its own, being a link or sparse

    def read(self) -> bytes:
        """The file's bytes."""
        if self.size < 0:
            raise ValueError("a link or a sparse file inside an archive: put the file itself in")
        check_file_size(self.size)
        with pathlib.Path(self.archive).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stamp(self) -> tuple[int, ...]:
        """Changes where the file does."""
        return self.offset, self.size, pathlib.Path(self.archive).stat().st_mtime_ns


@functools.lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def check_file_size(size: int) -> None:
    """Raises a ValueError for a file that is too large to be a picture."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are over {MAX_FILE_BYTES}: no picture is that large")


class ArchiveListing(NamedTuple):
    """Files below a folder of an archive."""

    archive: "Archive"
    names: Sequence[str]
    start: int  # of the names among the archive's

    def file(self, row: int) -> ZipMember | TarMember:  # noqa: D102
        return self.archive.member(self.start + row)


class Entry(NamedTuple):
    """One file of an archive's table of contents."""

    stored: str  # the name that it is stored by
    offset: int = 0  # as in TarMember
    size: int = 0


class Archive:
    """A .zip or .tar file. Its only top folder, if there is just one, is left out of the names."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the table of contents.

        Raises:
          UserError: the file cannot be read, is compressed as a whole, or has a member that leads out of it.
        """
        self.path = path
        names: list[str] = []
        stored: list[str] = []
        # Arrays, since an object for each of a million members would take a gigabyte.
        offsets, sizes = array.array("q"), array.array("q")
        try:
            with path.open("rb") as file:
                self._zipped = file.read(2) == b"PK"
            for entry in _entries(path, zipped=self._zipped):
                names.append(_safe_name(entry.stored, path))
                stored.append(entry.stored if self._zipped else "")
                offsets.append(entry.offset)
                sizes.append(entry.size)
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise UserError(
                f"--source={str(path)!r} cannot be read ({' '.join(str(error).split())}): give a folder, a .zip or an "
                "uncompressed .tar file that is whole."
            ) from error
        order = sorted(range(len(names)), key=names.__getitem__)
        # Of several by one name the last counts, as it does when they are unpacked.
        kept = [
            row
            for row, after in itertools.pairwise([*order, None])
            if row is not None and (after is None or names[row] != names[after])
        ]
        repeated = len(order) - len(kept)
        note = f"{repeated} files are in {path.name} more than once: the last of each counts."
        self.notes: tuple[str, ...] = (note,) if repeated else ()
        self._names, self._stored = [names[row] for row in kept], [stored[row] for row in kept]
        self._offsets, self._sizes = np.array(offsets)[kept], np.array(sizes)[kept]
        while self._names and (top := _only_folder(self._names)) and top not in LAYOUT_FOLDERS:
            self._names = [name[len(top) + 1 :] for name in self._names]

    def member(self, row: int) -> ZipMember | TarMember:
        """The file of a row of all names."""
        if self._zipped:
            return ZipMember(str(self.path), self._stored[row])
        return TarMember(str(self.path), int(self._offsets[row]), int(self._sizes[row]))

    def has_folder(self, name: str) -> bool:  # noqa: D102
        return bool(self.files(name).names)

    def files(self, folder: str = "") -> ArchiveListing:  # noqa: D102
        if not folder:
            return ArchiveListing(self, self._names, 0)
        start = bisect.bisect_left(self._names, f"{folder}/")
        end = bisect.bisect_left(self._names, f"{folder}0")  # 0 comes after /
        return ArchiveListing(self, [name[len(folder) + 1 :] for name in self._names[start:end]], start)

    def read(self, name: str) -> bytes | None:  # noqa: D102
        row = bisect.bisect_left(self._names, name)
        return self.member(row).read() if self._names[row : row + 1] == [name] else None

    def describe(self, folder: str = "") -> str:  # noqa: D102
        tops = {name.partition("/")[0] + "/" * ("/" in name) for name in self.files(folder).names}
        return describe_entries(sorted(tops))

    def has_images(self) -> bool:  # noqa: D102
        return any(name.lower().endswith(EXTENSIONS) for name in self._names)


def _entries(path: pathlib.Path, *, zipped: bool) -> Iterator[Entry]:
    """The files of an archive, in its order."""
    if zipped:
        with zipfile.ZipFile(path) as opened:
            yield from (Entry(info.filename) for info in opened.infolist() if not info.is_dir())
        return
    with tarfile.open(path, "r:") as opened:
        while (info := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
            if info.isreg() or info.issym() or info.islnk():
                whole = info.isreg() and not info.issparse()
                yield Entry(info.name, info.offset_data, info.size if whole else -1)


def _safe_name(stored: str, archive: pathlib.Path) -> str:
    """The name without `.` parts.

    Raises:
      UserError: the path is absolute, or leads out of the archive.
    """
    parts = stored.replace("\\", "/").split("/")
    if stored.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0].endswith(":")):
        raise UserError(
            f"--source={str(archive)!r}: the member {stored!a} leads out of the archive: nothing was read; do not "
            "trust this file, or make it anew without that member."
        )
    return "/".join(part for part in stored.split("/") if part not in ("", "."))


def _only_folder(names: Sequence[str]) -> str:
    """The folder that all names, which are sorted, begin with; empty where there is none."""
    top, slash, _ = names[0].partition("/")
    return top if slash and all(name.startswith(f"{top}/") for name in names) else ""
