"""SIGINT and SIGTERM: once asks a run to save and stop, twice ends it at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable


class StopSignals:
    """Listens from its making on, in a thread: the main one may be inside a compiled call of many seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` tells the user. To be made in the main thread, after what installs signal handlers of its own."""
        self._say = say
        self._first = 0
        self._asked = False
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._reader, self._writer = reader, writer  # closed sockets would be written to
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # so that the C handler writes its number to the descriptor
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def received(self) -> int:
        """The number of the first signal, 0 before; who asks will save and stop. Unasked, it ends the process."""
        self._asked = True
        return self._first

    def _listen(self) -> None:
        while number := self._reader.recv(1)[0]:
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            name = signal.Signals(number).name
            if self._first or not self._asked:
                self._say(f"{name}: ended at once; the same command goes on from the last checkpoint")
                sys.stdout.flush()
                os._exit(128 + number)
            self._first = number
            self._say(f"{name}: saving after this dispatch; once more ends at once")
