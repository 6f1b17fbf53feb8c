"""What the user can mend is told in one line; everything else keeps its traceback."""

import errno
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the key, path or value and the remedy. Command-line modules print it and end
    with exit code 2 (see `command_line.run`).
    """


def expand_home(path: str | os.PathLike[str], *, name: str) -> pathlib.Path:
    """`path` with `~` or `~user` replaced by that user's home directory.

    Args:
      path: as the user typed it.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the home directory is unknown; no file can have such a name.
    """
    try:
        found = pathlib.Path(path).expanduser()
        found.stat()
    except RuntimeError as error:
        message = f"{name}={str(path)!r}: the home directory that ~ stands for is unknown: write the path out."
        raise UserError(message) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name}={str(path)[:40]!r}... is longer than a file's name may be.") from error
    return found


def make_writable_directory(path: str | os.PathLike[str], *, name: str) -> pathlib.Path:
    """Creates the directory `path`, proves that files can be written there, and returns it.

    Args:
      path: the directory; `~` is expanded.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the directory cannot be made or written to.
    """
    directory = expand_home(path, name=name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # a name of its own: process numbers repeat across hosts
            pass
    except OSError as error:
        reason = error.strerror or error
        message = f"{name}={str(path)!r} cannot be written to ({reason}): choose a directory you may write to."
        raise UserError(message) from error
    return directory


def describe_entries(entries: Sequence[str]) -> str:
    """What is in a folder, in a few words."""
    if not entries:
        return "found: nothing (0 entries)"
    return f"found: {some(entries)} ({len(entries)} entries)"


def some(names: Iterable[str], *, most: int = 3) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
