"""Folders of images: finding the files, and telling the user what is there instead."""

import itertools
import os
import pathlib
from collections.abc import Iterable

from facevae_jax.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
FILES_LOOKED_AT = 1000


def image_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The PNG, JPEG and WebP files under `root`, sorted; nothing hidden. Symbolic links are followed.

    Raises:
      UserError: a folder cannot be read.
    """
    found, visited = [], set()

    def refuse(error: OSError) -> None:
        raise UserError(f"--source: {error.filename} cannot be read ({error.strerror}).") from error

    for current, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        identity = os.path.realpath(current)
        if identity in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [pathlib.Path(current, name) for name in files if _is_image(name)]
    return sorted(found)


def has_images(root: pathlib.Path) -> bool:
    """Whether the first files that are met under `root` are images; for a hint, so it neither fails nor takes long."""
    files = itertools.chain.from_iterable(files for _, _, files in os.walk(root))
    return any(_is_image(name) for name in itertools.islice(files, FILES_LOOKED_AT))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def require_folder(path: pathlib.Path) -> None:
    """Raises a UserError unless `path` is a folder."""
    if not path.is_dir():
        nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), pathlib.Path("/"))
        problem = (
            "is a file, not a folder" if path.exists() else f"does not exist; {nearest} {describe_folder(nearest)}"
        )
        raise UserError(f"--source={str(path)!r} {problem}: give the folder of the images.")


def describe_folder(path: pathlib.Path) -> str:
    """What is in a folder, in a few words."""
    try:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(path))
    except OSError as error:
        return f"found: nothing readable ({error.strerror})"
    if not entries:
        return "found: nothing (0 entries)"
    return f"found: {some(entries)} ({len(entries)} entries)"


def some(names: Iterable[str], *, most: int = 3) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
