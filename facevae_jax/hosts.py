"""Several processes as one run: joining them, agreeing, and leaving without keeping the others waiting.

JAX's own runtime does the work (`jax.distributed`, one program on many controllers); one process needs none of it.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from facevae_jax.errors import UserError

MESSAGE_BYTES = 2048  # of what went wrong in one process, told to all
CONNECT_SECONDS = 300  # that processes wait for each other at the start

T = TypeVar("T")


class Cluster(NamedTuple):
    """Where the processes of a run meet; all None: found out from the environment, one process where there is none."""

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process_id: int | None = None


class ElsewhereError(UserError):
    """A mistake that was met in another process; process 0 tells about it, and in the others the message is empty."""


def join(cluster: Cluster, *, heartbeat_seconds: int) -> None:
    """Makes this process one of a run's, before any other use of JAX.

    Without an address the environment is asked: Cloud TPU, GKE, Slurm and Open MPI describe themselves to their
    processes. A process that does not answer for `heartbeat_seconds` is taken for dead, which ends all others.

    Raises:
      UserError: the address is incomplete, or nobody answers there.
    """
    given = [value for value in cluster if value is not None]
    if given and len(given) < len(cluster):
        raise UserError("--coordinator=HOST:PORT, --processes=N and --process_id=I belong together: give all three.")
    if given:
        _check(cluster)
    try:
        jax.distributed.initialize(
            *cluster,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):  # which is how it says that this is no cluster
            raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--coordinator={cluster.coordinator!r}: the processes cannot meet there ({reason})."
        ) from error


def _check(cluster: Cluster) -> None:
    coordinator, processes, process_id = cluster
    assert coordinator is not None
    assert processes is not None
    assert process_id is not None
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT, the address of process 0.")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be from 0 to --processes - 1, which is {processes - 1}.")
    # JAX's client ends the process with a page of stack trace where nobody answers: look first.
    deadline = time.monotonic() + CONNECT_SECONDS
    while process_id and not _answers(host, int(port)):
        if time.monotonic() > deadline:
            raise UserError(
                f"--coordinator={coordinator!r}: nobody answers there after {CONNECT_SECONDS} s: "
                "start process 0, and see that its port can be reached from here."
            )
        time.sleep(0.2)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), timeout=5).close()
    except OSError:
        return False
    return True


def is_main() -> bool:
    """Whether this is process 0, which alone writes logs, pictures and the config."""
    return jax.process_index() == 0


def agree(*values: float) -> tuple[float, ...]:
    """Of each value the largest that a process gives; all must ask at the same point of the program."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.asarray(values, np.float32)).max(axis=0).tolist())


def together(function: Callable[[], T]) -> T:
    """What `function` gives in this process, once it has succeeded in all of them.

    Raises:
      UserError: the function raised one in process 0, for which this is.
      ElsewhereError: it raised one in another process, or this is another process.
    """
    if jax.process_count() == 1:
        return function()
    mistake, result = None, None
    try:
        result = function()
    except UserError as error:
        mistake = error
    told = np.zeros(MESSAGE_BYTES, np.uint8)
    text = str(mistake or "").encode()[:MESSAGE_BYTES]
    told[: len(text)] = np.frombuffer(text, np.uint8)
    failed = {
        number: bytes(row[row > 0]).decode(errors="replace")
        for number, row in enumerate(multihost_utils.process_allgather(told))
        if row.any()
    }
    if not failed:
        return result  # type: ignore[return-value]
    if not is_main():
        raise ElsewhereError
    if mistake is not None:
        raise mistake
    number, message = next(iter(failed.items()))
    raise ElsewhereError(f"process {number} of {jax.process_count()}: {message}")


def is_runtime_error(error: Exception) -> bool:
    """Whether JAX's runtime raised this, as it does where a collective cannot reach a process any more.

    The error of an operation that fails before it is dispatched in the background comes as a plain ValueError
    ("UNKNOWN: Gloo AllGather failed: ... Connection closed by peer"); the status it begins with tells it from ours.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(re.match(r"[A-Z][A-Z_]+: ", str(error)))


def leave(code: int) -> NoReturn:
    """Ends this process at once: an orderly end would wait for the other processes, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
