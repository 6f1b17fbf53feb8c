#!/usr/bin/env python3
"""Runs a command as several processes of one run on this machine, and restarts all of them when one fails.

    python launch/local.py --processes=2 -- python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/run

Each process gets the command with --coordinator, --processes and --process_id, and its output lines start with its
number. With --devices=K each has K virtual CPU devices. CPU processes share the cores. SIGINT and SIGTERM are passed
on to all. Exit codes 130 and 143 (saved and stopped) and 2 (a mistake in the command) are not followed by a restart.
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
END_SECONDS = 10  # after a mistake in one process, for the others to exit


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def copy_lines(number: int, stream: TextIO, target: TextIO) -> None:
    """Copies the output lines of a process, each behind the process's number."""
    for line in stream:
        target.write(f"[{number}] {line}")
        target.flush()


def start(command: list[str], *, processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """Starts the processes of one attempt."""
    environment = dict(os.environ)
    if devices:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
        environment["JAX_PLATFORMS"] = "cpu"
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu"
    if on_cpu:  # if each process had a thread for every core, they would wait for each other
        environment.setdefault("NPROC", str(max(1, (os.cpu_count() or 1) // processes)))
    words = [*command, f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    members, pipe = [], subprocess.PIPE
    for number in range(processes):
        one = [*words, f"--process_id={number}"]
        member = subprocess.Popen(one, env=environment, stdout=pipe, stderr=pipe, text=True)
        members.append(member)
        if on_cpu and hasattr(os, "SCHED_BATCH"):  # preempts computing threads less; exchanges wait 3 times less
            with contextlib.suppress(OSError):  # it has ended already, or this system does not allow it
                os.sched_setscheduler(member.pid, os.SCHED_BATCH, os.sched_param(0))
        for stream, target in ((member.stdout, sys.stdout), (member.stderr, sys.stderr)):
            threading.Thread(target=copy_lines, args=(number, stream, target)).start()
    return members


def wait(members: list[subprocess.Popen[str]]) -> int:
    """Waits for all; returns the exit code of the process that failed first, or 0."""
    running, first_failure, deadline = dict(enumerate(members)), 0, float("inf")
    while running:
        for number, member in list(running.items()):
            code = member.poll()
            if code is not None:
                del running[number]
            if code:
                first_failure = first_failure or code
                end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                print(f"process {number} of {len(members)} {end}", file=sys.stderr, flush=True)
            if code == 2:
                deadline = min(deadline, time.monotonic() + END_SECONDS)
        if time.monotonic() > deadline:
            for member in running.values():
                member.kill()
        time.sleep(0.05)
    return first_failure


def main() -> int:
    """Runs the processes, again after each failure that a restart may fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each (default: real devices)")
    parser.add_argument("--restarts", type=int, default=3, help="at most (default: 3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command", help="of one process")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or arguments.processes < 1:
        parser.error("give at least one process and a command: launch/local.py --processes=2 -- python -m ...")

    members: list[subprocess.Popen[str]] = []
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        for member in members:
            member.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    code = 0
    for attempt in range(arguments.restarts + 1):
        members[:] = start(command, processes=arguments.processes, devices=arguments.devices)
        code = wait(members)
        if stopped:  # processes that had nothing to save were ended by the signal itself
            return 128 + stopped[0] if code else 0
        if code in FINAL:
            return code
        if attempt < arguments.restarts:
            print(f"restarting all processes ({attempt + 1} of {arguments.restarts})", file=sys.stderr, flush=True)
    print("giving up: every restart failed", file=sys.stderr)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
