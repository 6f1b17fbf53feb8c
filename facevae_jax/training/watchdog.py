"""Ends a run that makes no progress: a stuck peer, a network that silently drops packets, a device that hangs."""

import faulthandler
import sys


class Watchdog:
    """A context manager: after the first heartbeat, at most `seconds` may pass until the next.

    A timer thread in C, which needs no GIL, then writes "Timeout (h:mm:ss)!" and the stack of every thread to standard
    error, which shows what hangs, and ends the process with exit code 1. The last finished step is in the log above it.
    The time before the first heartbeat, for reading data and compiling, is not limited. Python has one such timer per
    process, so runs must not overlap in one process.
    """

    def __init__(self, seconds: int) -> None:
        """Takes `config.train.watchdog_seconds`, where 0 means no limit."""
        self.step = 0  # the last finished one
        self._seconds = seconds

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def heartbeat(self, step: int | None = None) -> None:
        """Reports progress: the step that has finished, or None for work between steps, such as an evaluation."""
        self.step = self.step if step is None else step
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or sys.stderr)
