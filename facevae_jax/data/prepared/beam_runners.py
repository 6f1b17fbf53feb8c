"""Beam's options, and what differs from runner to runner.

Beam is imported where it is used: preparation on one machine works where it is not installed.
"""

import contextlib
import io
import logging
import os
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import reason
from facevae_jax.core.parallel import available_cpus

DIRECT = ("direct", "directrunner", "fnapirunner")  # runners on this machine
THREADS = 2  # per process of another runner: one converts while the other waits for a file


def parse_options(text: str) -> Any:
    """Beam's `PipelineOptions`, from words as on a command line.

    Raises UserError: Beam is not installed, or an option or its value is unknown.
    """
    import_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    complaint = io.StringIO()
    try:
        words = shlex.split(text)
        options = PipelineOptions(words)
        with contextlib.redirect_stderr(complaint):  # argparse writes and exits
            unknown = sorted(_all(options, retain_unknown_options=True).keys() - _all(options).keys())
    except ValueError as error:  # shlex's
        raise UserError(f"--beam_options={text!r}: {reason(error)}.") from error
    except SystemExit as error:
        said = complaint.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"--beam_options={text!r}: {said or 'cannot be read'}.") from error
    wrong = [f"--{name}" for name in unknown] + [word for word in words[:1] if not word.startswith("--")]
    if _is_direct(options) and wrong:  # other runners have options that only their job server knows
        raise UserError(f"--beam_options={text!r}: {wrong[0]} is not an option of Beam's: see docs/beam.md.")
    return options


def failure(error: BaseException) -> str:
    """What went wrong on a worker: the last line of the traceback in a runner's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = re.sub(r" \[while running .*$", "", lines[-1])
    return re.sub(r"^((RuntimeError|[\w.]*UserError): )+", "", said)


def import_beam() -> Any:
    """Imports Beam. Raises UserError: it is not installed."""
    try:
        with _quiet():
            import apache_beam
            import apache_beam.metrics
    except ImportError as error:
        raise UserError('--beam_options needs Apache Beam: pip install "facevae-jax[beam]".') from error
    return apache_beam


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about parts of Beam that are not installed and not used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _all(options: Any, **how: bool) -> dict[str, Any]:
    with _quiet():
        return options.get_all_options(**how)


def _is_direct(options: Any) -> bool:
    return (_all(options)["runner"] or "DirectRunner").lower() in DIRECT


def make_runner(options: Any) -> Any:
    """The runner of the options; for the DirectRunner the one that is written in Python.

    Beam's DirectRunner would first download the runner Prism, which ignores the options --direct_....
    """
    if not _is_direct(options):
        return None
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    # An error reaches the user in one line; Beam would write it again, with its traceback.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    return FnApiRunner()


@contextlib.contextmanager
def workers_log(options: Any) -> Iterator[str]:
    """Has worker processes of this machine write to a file, whose name it yields; empty if there are none.

    They inherit standard error, where each writes what it does and, several times, the traceback of an error. The file
    is kept if the block ends with an error.
    """
    if not _is_direct(options) or _all(options)["direct_running_mode"] != "multi_processing":
        yield ""
        return
    sys.stderr.flush()
    log, path = tempfile.mkstemp(prefix="facevae-beam-", suffix=".log")
    standard_error = os.dup(2)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield path
        pathlib.Path(path).unlink()
    except KeyboardInterrupt:
        pathlib.Path(path).unlink()
        raise
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)


def threads_per_worker(options: Any) -> int:
    """Threads of each worker; together they are one more than this machine's cores, as they are without Beam."""
    if not _is_direct(options):
        return THREADS
    processes = _all(options)["direct_num_workers"] or available_cpus()  # 0: one for each core
    return max(1, (available_cpus() + 1) // processes)
