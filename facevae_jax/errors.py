"""What the user can mend is told in one line; everything else keeps its traceback."""

import os
import pathlib


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the key, path or value and the remedy. Command-line modules print it and end
    with exit code 2 (see `command_line.run`).
    """


def make_writable_directory(path: str | os.PathLike[str], *, name: str) -> pathlib.Path:
    """Creates the directory `path`, proves that files can be written there, and returns it.

    Args:
      path: the directory; `~` is expanded.
      name: the flag or key that set it, for the message.

    Raises:
      UserError: the directory cannot be made or written to.
    """
    directory = pathlib.Path(path).expanduser()
    probe = directory / f".writable-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        message = f"{name}={str(path)!r} cannot be written to ({reason}): choose a directory you may write to."
        raise UserError(message) from error
    return directory
