"""Ends a run that no longer moves: another process that is stuck, a network that swallows, a device that hangs."""

import sys
import threading
import time

from facevae_jax import hosts

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, and starting it again goes on from the last checkpoint.
START_AGAIN = 75


class Watchdog:
    """Use as a context manager; from the first beat on no more than `seconds` may pass to the next.

    What comes before, reading and compiling, may take any time.
    """

    def __init__(self, seconds: int, *, step: int) -> None:
        """`step` is the last that was finished; 0 seconds: never ends the run."""
        self.step = step
        self._seconds = seconds
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def beat(self, step: int | None = None) -> None:
        """Something was finished: a step, or with None a part of what comes between steps."""
        self.step = self.step if step is None else step
        self._last = time.monotonic()
        if self._seconds and not self._thread.ident:
            self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 10)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                print(
                    f"error: nothing was finished for {silent:.0f} s (config.train.watchdog_seconds={self._seconds}); "
                    f"the last finished step is {self.step:,}. A process or a device is stuck: start all again, the "
                    "same command goes on from the last checkpoint.",
                    file=sys.stderr,
                )
                hosts.leave(START_AGAIN)
