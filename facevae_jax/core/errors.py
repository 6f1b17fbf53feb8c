"""Errors that the user can fix print one line; all others keep their traceback."""

import contextlib
import errno
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence

# A full disk or quota, a read-only disk, and the largest file that a process may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Rights, limits and failures of the file system, which say nothing about what is in a file.
OF_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
)


FLAG = re.compile(r"(?<![\w'\"-])--(?=[a-z])")  # but not at the start of a quoted value

_in_command = False


@contextlib.contextmanager
def in_command() -> Iterator[None]:
    """While the block runs, errors name flags."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


class UserError(Exception):
    """An error that the user can fix.

    The message is one line that names the key, path or value and the remedy. Commands print it and exit with code 2
    (see `command_line.run`). It is written with flags, such as --rows=3. A caller from Python reads arguments, rows=3;
    flags of a command in the message stay flags.
    """

    def __init__(self, message: str = "") -> None:
        before, command, after = message.partition("python -m ")
        super().__init__(message if _in_command else FLAG.sub("", before) + command + after)


def check_choice(value: object, choices: Sequence[str], *, name: str) -> None:
    """Raises a UserError unless the value of the flag or argument `name` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def expand_home(path: str | os.PathLike[str], *, name: str) -> pathlib.Path:
    """`path` with `~` or `~user` replaced by that user's home directory.

    Args:
      path: as the user typed it.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the home directory is unknown, or the name is too long for a file.
    """
    try:
        found = pathlib.Path(os.fsdecode(path)).expanduser()
        found.stat()
    except (TypeError, ValueError) as error:  # no path at all, or one with a zero byte
        raise UserError(f"{name}={path!r:.80} is no path: give one as text.") from error
    except RuntimeError as error:
        message = f"{name}={str(path)!r}: the home directory of ~ is unknown: write the full path."
        raise UserError(message) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name}={str(path)[:40]!r}... is too long for the name of a file.") from error
        if error.errno == errno.ELOOP:
            raise UserError(f"{name}={str(path)!r} is a link that leads back to itself: give another path.") from error
    return found


def writable_file(path: pathlib.Path, *, name: str) -> pathlib.Path:
    """The path, where a file can be written.

    Raises:
      UserError: it is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{name}={str(path)!r} is a folder: give the name of a file in it.")
    make_writable_directory(path.parent, name=f"{name}'s directory")
    return path


def make_writable_directory(path: str | os.PathLike[str], *, name: str) -> pathlib.Path:
    """Creates the directory `path`, checks that files can be written there, and returns it.

    Args:
      path: the directory; `~` is expanded.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the directory cannot be created or written to.
    """
    directory = expand_home(path, name=name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # a unique name: several hosts may check at once
            pass
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = "it is a link that leads nowhere" if directory.is_symlink() else "it is no directory"
        message = f"{name}={str(path)!r} cannot be written to ({reason}): choose a directory you may write to."
        raise UserError(message) from error
    return directory


def of_environment(error: BaseException) -> str:
    """One line for an error whose cause is the machine or a variable, with the remedy; empty for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'a file'} cannot be written ({error.strerror}): make room, and give it again."
    if isinstance(error, OSError) and error.errno in OF_MACHINE and error.filename:
        return f"{error.filename}: {error.strerror}: mend that, and give the same command again."
    if isinstance(error, EOFError) and "marshal data" in text:  # Python does not notice a full disk as it writes one
        folder = pathlib.Path(__file__).parents[1]
        return f"a compiled module of Python is cut short: run python -m compileall -qf {folder}"
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text:
        said = text.partition("RESOURCE_EXHAUSTED: ")[2][:80]
        remedy = "choose a smaller --batch_size; in training, a larger --config.train.accumulation"
        return f"the device has too little memory ({said}): {remedy}."
    if named := re.search(r"for JAX flag (\w+)|environment '?(JAX_\w+)", text):
        variable = (named[1] or named[2]).upper()
        return f"{variable}={os.environ.get(variable, '')!r} is no value that JAX takes: unset it."
    return ""


def describe_entries(entries: Sequence[str]) -> str:
    """A short summary of a folder's entries, for messages."""
    if not entries:
        return "found: nothing (0 entries)"
    return f"found: {some(entries)} ({len(entries)} entries)"


def some(names: Iterable[str]) -> str:
    """The first three names, for messages, on one line."""
    names = list(names)
    shown = ["".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name) for name in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
