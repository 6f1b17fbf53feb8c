"""The other end of `benchmarks.peers.worker`: starts it, asks it, and survives its death."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import REPOSITORY
from facevae_jax.config import RunConfig

ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the workers share the accelerator's memory
    "CUDA_VISIBLE_DEVICES": "0",  # one device for every peer: most of them use no more
}
CLOSE_SECONDS = 5.0  # for a worker to end by itself


class WorkerError(Exception):
    """The worker failed, died or hung; the message is one line."""


def worker_command(peer: str, config: RunConfig) -> list[str]:
    """The command of one worker."""
    config_json = json.dumps(config.to_dict())
    return [sys.executable, "-m", "benchmarks.peers.worker", f"--peer={peer}", f"--config={config_json}"]


class Worker:
    """A worker process, which is ready once the constructor returns."""

    def __init__(self, command: Sequence[str], *, time_limit: float) -> None:
        """Starts the command and waits for its first answer, `self.ready`.

        Raises:
          WorkerError: it was not ready within `time_limit` seconds.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (until `close`)
        self._received = b""
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=ENVIRONMENT | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # a process group, which is killed with whatever compilers the worker has started
        )
        self.ready = self._answer(time_limit)

    def train(self, steps: int, *, time_limit: float) -> dict[str, Any]:
        """Trains for about `steps` steps and returns {"images", "seconds"}.

        Raises:
          WorkerError: there was no answer within `time_limit` seconds.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker's reason is found below
            self._process.stdin.write(json.dumps({"steps": steps}).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(time_limit)

    def close(self) -> None:
        """Ends the process and all that it has started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._end(CLOSE_SECONDS)
        self._process.stdout.close()
        self._errors.close()

    def _end(self, grace: float) -> int:
        """The exit status of the process, which is killed after `grace` seconds."""
        try:
            return self._process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            return self._process.wait()

    def _answer(self, time_limit: float) -> dict[str, Any]:
        """The next line of the worker's stdout; a failure closes the worker."""
        try:
            answer = self._parse(self._line(time.monotonic() + time_limit), time_limit)
        except BaseException:
            self.close()
            raise
        return answer

    def _parse(self, line: bytes | None, time_limit: float) -> dict[str, Any]:
        if line is None:
            self._end(0.0)
            raise WorkerError(f"no answer within {time_limit:.0f} s")
        if not line:
            raise WorkerError(f"ended with status {self._end(CLOSE_SECONDS)}: {self._last_error()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """One line, b"" where the worker has closed its stdout, None where the time is over."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            received = os.read(descriptor, 65_536)
            if not received:
                return b""
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"
