"""Commands of the project, run as a user runs them, with their time and memory."""

import subprocess
import sys
import threading
import time
from typing import NamedTuple

import psutil

from benchmarks.environment import REPOSITORY
from facevae_jax.errors import UserError

POLL_SECONDS = 0.02


class Measured(NamedTuple):
    """One run of a command."""

    seconds: float
    peak_bytes: int  # resident, of the command and its children
    peak_anonymous_bytes: int  # of these, without the pages of mapped files, which the system can drop
    output: str


def run_measured(module: str, *arguments: str) -> Measured:
    """Runs `python -m module`.

    Raises:
      UserError: the command's own message, where it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, anonymous = 0, 0

    def watch() -> None:
        nonlocal peak, anonymous
        while process.poll() is None:
            resident, mapped = resident_bytes(process.pid)
            peak, anonymous = max(peak, resident), max(anonymous, resident - mapped)
            time.sleep(POLL_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"{module} ended with status {process.returncode}"]
        raise UserError(lines[-1].removeprefix("error: "))
    return Measured(seconds, peak, anonymous, output)


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of a process and its children, and how much of it is mapped from files."""
    total, mapped = 0, 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:  # it has just ended
                continue
            total += memory.rss
            mapped += getattr(memory, "shared", 0)
    except psutil.NoSuchProcess:
        pass
    return total, mapped
