"""Each trainer in a process of its own, which trains when it is asked to and sleeps in between."""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from benchmarks.peers.case import Case
from benchmarks.suites.timing import seconds_each
from facevae_jax.config import RunConfig
from facevae_jax.core import startup

CALIBRATION_SECONDS = 2.0
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the workers share the accelerator's memory
    "CUDA_VISIBLE_DEVICES": "0",  # one device for every peer: most of them use no more
}


class Peer(NamedTuple):
    """A trainer to compare with."""

    module: str  # with a function `make_case`
    variant: str = ""
    environment: tuple[tuple[str, str], ...] = ()  # variables that must be set before its process starts


TORCH, KERAS = "benchmarks.peers.torch_vae", "benchmarks.peers.keras_vae"
PEERS = {
    "ours": Peer("benchmarks.peers.ours", environment=((startup.TUNABLES, f"{startup.HUGE_PAGES}=1"),)),  # as main does
    "torch eager": Peer(TORCH, "eager"),
    "torch eager channels-last": Peer(TORCH, "eager channels-last"),
    "torch compile": Peer(TORCH, "compile"),
    "torch compile channels-last": Peer(TORCH, "compile channels-last"),
    "keras fit (jax)": Peer(KERAS, "jax", (("KERAS_BACKEND", "jax"),)),
    "keras fit (torch)": Peer(KERAS, "torch", (("KERAS_BACKEND", "torch"),)),
    "pythae": Peer("benchmarks.peers.pythae_vae", environment=(("TQDM_DISABLE", "1"),)),  # no progress bar
}
HIERARCHY_PEERS = {  # of a config with a hierarchy
    name: peer._replace(module="benchmarks.peers.torch_hierarchy") if peer.module == TORCH else peer
    for name, peer in PEERS.items()
    if name == "ours" or peer.module == TORCH
}


class WorkerError(Exception):
    """The worker failed, died or hung; the message is one line."""


class Worker:
    """A worker process, which is ready once the constructor returns."""

    def __init__(self, peer: Peer, config: RunConfig, *, time_limit: float) -> None:
        """Starts the process and waits until it has compiled and warmed up.

        `ready` then holds its "seconds_per_step", "parameters", "device" and "versions".

        Raises:
          WorkerError: it was not ready within `time_limit` seconds.
        """
        # A process group, which is killed with whatever compilers the peer has started.
        context = multiprocessing.get_context("spawn")
        self._executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_be_a_group)
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT | dict(peer.environment) | before)
        try:
            self._group = self._executor.submit(os.getpid).result()
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
        self.ready: dict[str, Any] = self._call(_prepare, peer, config, time_limit=time_limit)

    def train(self, steps: int, *, time_limit: float) -> float:
        """Trains for `steps` steps, after others to warm up, and returns the seconds that they take.

        Raises:
          WorkerError: there was no answer within `time_limit` seconds.
        """
        return self._call(_train, steps, time_limit=time_limit)

    def close(self) -> None:
        """Ends the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)
        self._executor.shutdown()

    def _call(self, function: Callable[..., Any], *arguments: Any, time_limit: float) -> Any:
        try:
            return self._executor.submit(function, *arguments).result(time_limit)
        except TimeoutError:
            reason = f"no answer within {time_limit:.0f} s"
        except BrokenProcessPool:
            reason = "its process died"
        except Exception as error:  # of any library: the other peers continue
            reason = traceback.format_exception_only(error)[0].strip().partition("\n")[0]
        self.close()
        raise WorkerError(reason)


def _be_a_group() -> None:
    """Makes the worker's process a group, which ends with the process that started it, however that ends."""
    os.setsid()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


_case: Case | None = None  # of this process


def _prepare(peer: Peer, config: RunConfig) -> dict[str, Any]:
    """Makes the case in the worker's process; returns what `Worker.ready` holds."""
    global _case
    _case = importlib.import_module(peer.module).make_case(config, peer.variant)
    _case.train(3)  # compiles
    seconds = seconds_each(_case.train, seconds=CALIBRATION_SECONDS)
    return {"seconds_per_step": seconds, **{key: value for key, value in _case._asdict().items() if key != "train"}}


def _train(steps: int) -> float:
    assert _case is not None
    _case.train(max(1, steps // 2))  # not timed: the system may have taken memory back while the process slept
    return _case.train(steps)
