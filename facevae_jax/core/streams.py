"""Standard streams that may fail: what cannot be printed is lost, and the command goes on."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class Unbreakable:
    """A text stream whose reader may die, whose disk may be full, and whose encoding may lack a character.

    A run that computes for days must not end because `tee` or a terminal did.
    """

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, or loses it."""
        with self._failures():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        with self._failures():
            self._stream.flush()

    @contextlib.contextmanager
    def _failures(self) -> Any:
        try:
            yield
        except BrokenPipeError:  # nobody will read again: what is buffered would fail at the exit too
            send_nowhere(self._stream.fileno())
        except (OSError, ValueError):  # a full disk, or a stream that was closed
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def send_nowhere(descriptor: int) -> None:
    """From now on what is written to the descriptor is lost. A process that is started inherits it."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def make_unbreakable() -> None:
    """Makes standard output and error `Unbreakable`. One that is closed becomes the null device.

    Otherwise the next file that is opened, such as a checkpoint, would get its number and all that is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            send_nowhere(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream or open(os.devnull, "w")))  # noqa: SIM115, PTH123 - open till the end


def finish() -> None:
    """Flushes standard output and error; one that fails is sent nowhere, or Python's exit code would be 120."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            getattr(stream, "_stream", stream).flush()
        except (OSError, ValueError):
            send_nowhere(descriptor)
