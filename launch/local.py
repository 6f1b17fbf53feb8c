#!/usr/bin/env python3
"""Runs a command as several processes of one run on this machine, and starts all again when one of them dies.

    python launch/local.py --processes=2 -- python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/run

Each process gets the command with --coordinator, --processes and --process_id; its lines are shown behind its number.
With --devices=K each has K virtual CPU devices. CPU processes share out the cores. SIGINT and SIGTERM go to all of
them. A run that saved and stopped, or whose command is wrong (exit codes 130, 143 and 2), is not started again.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO

FINAL = (0, 2, 130, 143)
END_SECONDS = 10  # that the others get to end by themselves after what cannot be mended


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def show(number: int, stream: TextIO, to: TextIO) -> None:
    """Copies the lines of a process, behind its number."""
    for line in stream:
        to.write(f"[{number}] {line}")
        to.flush()


class Group:
    """The processes of one attempt."""

    def __init__(self, command: list[str], *, processes: int, devices: int) -> None:
        """Starts them."""
        environment = dict(os.environ)
        if devices:
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
            environment["JAX_PLATFORMS"] = "cpu"
        if environment.get("JAX_PLATFORMS") == "cpu":  # with threads for all cores each they would wait for each other
            environment.setdefault("NPROC", str(max(1, (os.cpu_count() or 1) // processes)))
        port = free_port()
        self.members: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []
        for number in range(processes):
            where = (f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_id={number}")
            member = subprocess.Popen(
                [*command, *where], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            self.members.append(member)
            if environment.get("JAX_PLATFORMS") == "cpu":
                _schedule(member.pid)
            for stream, to in ((member.stdout, sys.stdout), (member.stderr, sys.stderr)):
                assert stream is not None
                self.readers.append(threading.Thread(target=show, args=(number, stream, to)))
                self.readers[-1].start()

    def send(self, number: int) -> None:
        """Sends a signal to all that still run."""
        for member in self.members:
            if member.poll() is None:
                member.send_signal(number)

    def wait(self) -> int:
        """Waits for all; the exit code of the one that failed first, or 0."""
        failures: dict[int, int] = {}  # process to exit code, in the order they were noticed
        deadline = float("inf")
        running = True
        while running:
            running = any(member.poll() is None for member in self.members)
            for number, member in enumerate(self.members):
                if member.returncode and number not in failures:
                    failures[number] = member.returncode
                    print(
                        f"process {number} of {len(self.members)} {describe(member.returncode)}",
                        file=sys.stderr,
                        flush=True,
                    )
                    if member.returncode == 2:
                        deadline = min(deadline, time.monotonic() + END_SECONDS)
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            if running:
                time.sleep(0.05)
        for reader in self.readers:
            reader.join()
        return next(iter(failures.values()), 0)


def _schedule(pid: int) -> None:
    """Lets the threads that compute run on while others of them wake up; waits for each other get 3 times shorter."""
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # it has ended already, or this system does not allow it
            os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def describe(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main() -> int:
    """Runs the processes, again after each failure that starting again may mend."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each (default: what it has)")
    parser.add_argument("--restarts", type=int, default=3, help="after which it is given up (default: 3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command", help="of one process")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or arguments.processes < 1:
        parser.error("give at least one process and a command: launch/local.py --processes=2 -- python -m ...")

    group: list[Group] = []
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        if group:
            group[-1].send(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = 0
    for attempt in range(arguments.restarts + 1):
        group.append(Group(command, processes=arguments.processes, devices=arguments.devices))
        code = group[-1].wait()
        if stopped:  # those that had nothing to save yet ended by the signal itself
            return 128 + stopped[0] if code else 0
        if code in FINAL:
            return code
        if attempt < arguments.restarts:
            print(f"starting all again ({attempt + 1} of {arguments.restarts})", file=sys.stderr, flush=True)
    print("given up: every restart failed", file=sys.stderr)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
