"""Several processes as one run: how they connect, agree on values, and exit without blocking each other.

`jax.distributed` does the work, with the same program on every host. A single process needs none of this.
"""

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from facevae_jax.core.errors import UserError

# EX_TEMPFAIL of sysexits.h: the command is right, and starting it again resumes from the last checkpoint.
START_AGAIN = 75
MESSAGE_BYTES = 2048  # of an error message that one process sends to all
CONNECT_SECONDS = 300  # that processes wait for each other at the start

T = TypeVar("T")


class ElsewhereError(UserError):
    """A `UserError` of another process. Process 0 reports it; in the others the message is empty."""


def join(coordinator: str | None, processes: int | None, process_id: int | None, *, heartbeat_seconds: int) -> None:
    """Connects this process to the others of the run; call it before any other use of JAX.

    Without an address, JAX detects Cloud TPU, GKE, Slurm and Open MPI from the environment; without these the process
    is alone.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: of the run.
      process_id: of this one, from 0.
      heartbeat_seconds: a process that is silent for so long counts as dead, which ends all others.

    Raises:
      UserError: the address is incomplete, or the coordinator does not answer.
    """
    found = coordinator is None and processes is None and process_id is None
    if coordinator is not None and processes is not None and process_id is not None:
        _check(coordinator, processes, process_id)
    elif not found:
        raise UserError("--coordinator=HOST:PORT, --processes=N and --process_id=I belong together: set all three.")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method=None if found else "deactivate",
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):  # the error that JAX raises where it detects no cluster
            raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--coordinator={coordinator!r}: the processes cannot connect ({reason}).") from error


def _check(coordinator: str, processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT, the address of process 0.")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be from 0 to --processes - 1, which is {processes - 1}.")
    # Without a coordinator JAX's client aborts the process with a page of stack trace, so check first.
    deadline = time.monotonic() + CONNECT_SECONDS
    while process_id:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"--coordinator={coordinator!r} did not answer for {CONNECT_SECONDS} s: "
                "start process 0 and check that its port is reachable from this host."
            )
        time.sleep(0.2)


def is_main() -> bool:
    """Whether this is process 0, the only one that writes logs, pictures and the config."""
    return jax.process_index() == 0


def agree(*values: float) -> tuple[float, ...]:
    """The maximum of each value over all processes, which must all call this at the same point of the program."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.asarray(values, np.float32)).max(axis=0).tolist())


def together(function: Callable[[], T]) -> T:
    """Calls `function` in every process and returns its result once it has succeeded in all of them.

    Raises:
      UserError: in process 0, whose own call raised it.
      ElsewhereError: the call of another process raised a `UserError`, or this is not process 0.
    """
    if jax.process_count() == 1:
        return function()
    own_error, result = None, None
    try:
        result = function()
    except UserError as error:
        own_error = error
    message_bytes = np.zeros(MESSAGE_BYTES, np.uint8)
    text = str(own_error or "").encode()[:MESSAGE_BYTES]
    message_bytes[: len(text)] = np.frombuffer(text, np.uint8)
    failed = {
        number: bytes(row[row > 0]).decode(errors="replace")
        for number, row in enumerate(multihost_utils.process_allgather(message_bytes))
        if row.any()
    }
    if not failed:
        return result  # type: ignore[return-value]
    if not is_main():
        raise ElsewhereError
    if own_error is not None:
        raise own_error
    number, message = next(iter(failed.items()))
    raise ElsewhereError(f"process {number} of {jax.process_count()}: {message}")


def of_main(tree: Any) -> Any:
    """Arrays of process 0, which another process may have computed with other rounding."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def is_runtime_error(error: Exception) -> bool:
    """Whether JAX's runtime raised this error, as it does when a collective loses a process.

    An operation that fails before its dispatch raises a plain ValueError ("UNKNOWN: Gloo AllGather failed: ...
    Connection closed by peer"), which the status at its start tells from our own errors.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(re.match(r"[A-Z][A-Z_]+: ", str(error)))


def leave(code: int) -> NoReturn:
    """Exits at once: a normal exit would wait for the other processes, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
