"""Signals that ask a run to stop: the first makes it save and stop, the second ends it at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

# Ctrl-C; a closed terminal, unless `nohup` had it ignored; and what batch systems send before a time limit.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopSignals:
    """Starts listening when constructed, in a thread, as the main thread may be in a compiled call for seconds."""

    def __init__(self, log: Callable[[str], None]) -> None:
        """Call it in the main thread, after libraries have installed their signal handlers; `log` takes messages."""
        self._log = log
        self._first = 0
        self._asked = False
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._reader, self._writer = reader, writer  # kept open: the signal handler writes to them
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, lambda *_: None)  # without a handler, Python writes no number to the descriptor
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def received(self) -> int:
        """The number of the first signal, or 0. Before the first call of this, a signal ends the process at once."""
        self._asked = True
        return self._first

    def end_at_once(self) -> None:
        """From now on a signal ends the process: there is nothing left to save."""
        self._asked = False

    def _listen(self) -> None:
        while number := self._reader.recv(1)[0]:
            if number not in STOPPING:
                continue
            name = signal.Signals(number).name
            if self._first or not self._asked:
                self._log(f"{name}: ended at once; the same command resumes from the last checkpoint")
                sys.stdout.flush()
                os._exit(128 + number)
            self._first = number
            self._log(f"{name}: saving after this dispatch; a second signal ends the run at once")
