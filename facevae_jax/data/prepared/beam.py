"""Preparation by many machines: the conversion of shards as an Apache Beam pipeline.

The unit of work is a shard. For each there is a file with the list of its images, so that only file names travel
through the pipeline: runners limit the size of what is submitted. A worker writes the shard under a temporary name,
renames it when it is complete, and then writes its manifest; so a runner may give the same shard to several workers,
one after the other or at once. The bytes are those of `conversion.convert_layout`.

Beam is imported where it is used: preparation on one machine works where it is not installed.
"""

import contextlib
import functools
import io
import logging
import os
import pathlib
import pickle
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import reason
from facevae_jax.core.parallel import available_cpus
from facevae_jax.data.layouts.types import Layout
from facevae_jax.data.prepared import builder, conversion
from facevae_jax.data.prepared.locations import is_remote, location, uploading
from facevae_jax.data.sources import images

REUSED = "images_reused"  # name of a counter
DIRECT = ("direct", "directrunner", "fnapirunner")  # runners on this machine
THREADS = 2  # per process of another runner: one converts while the other waits for a file


def prepare_dataset(
    layout: Layout, *, data_dir: str | os.PathLike[str], options: str, workers: int | None = None, **others: Any
) -> builder.Prepared:
    """As `builder.prepare_dataset`, by a Beam pipeline; the images and `data_dir` are the same paths for every worker.

    `data_dir` may be a URL such as gs://bucket/folder. `options` are Beam's, as on a command line; empty: one worker on
    this machine. `workers` are threads of each worker, by default as many as fit its share of this machine's cores.

    Raises:
      UserError: Beam is not installed, its options are wrong, the pipeline failed, or as `builder.prepare_dataset`.
    """
    parsed = parse_options(options)
    return builder.prepare_dataset(
        layout,
        data_dir=data_dir if is_remote(data_dir) else location(data_dir, name="--data_dir").absolute(),
        workers=workers or threads_per_worker(parsed),
        convert=functools.partial(convert_layout, options=parsed),
        **others,
    )


def convert_layout(layout: Layout, job: conversion.Job, *, options: Any) -> conversion.Outcome:
    """As `conversion.convert_layout`, by a pipeline with these `PipelineOptions`. Raises UserError: it failed."""
    conversion.import_for_writing()  # also for workers that are threads of this process
    shards = list(conversion.plan_shards(layout, resolution=job.task.resolution))
    for shard in shards:
        with uploading(list_of(shard.file_name(job.name), job)) as listed:
            listed.write_bytes(pickle.dumps(shard._replace(members=list(shard.members))))
    outcome = conversion.Outcome([], reused=run_pipeline([shard.file_name(job.name) for shard in shards], job, options))
    for shard in shards:
        try:
            outcome.shards.append((shard, conversion.read_manifest(job.manifest(shard))))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{job.manifest(shard)} is missing ({reason(error)}): all workers need the same --data_dir."
            ) from error
    return outcome


def list_of(file: str, job: conversion.Job) -> Any:
    """Where the list of the images of a shard is; only its name travels through the pipeline."""
    return job.manifests / f"{file}.list"


def run_pipeline(files: list[str], job: conversion.Job, options: Any) -> int:
    """Converts the shards of these names; how many images were converted before. Raises UserError: it failed."""
    beam = import_beam()
    given = f"--beam_options={shlex.join(options._flags)!r}"
    try:
        pipeline = beam.Pipeline(runner=make_runner(options), options=options)
        _ = pipeline | beam.Create(files) | "convert" >> beam.Map(convert_shard, job=job)
    except (ValueError, ImportError) as error:  # options that do not fit together
        raise UserError(f"{given}: {reason(error)}") from error
    result, log = None, ""
    try:
        with workers_log(options) as log:
            result = pipeline.run()
            state = result.wait_until_finish()
    except KeyboardInterrupt:
        if result is not None:  # a service would continue without this process
            result.cancel()
        raise
    except Exception as error:  # each runner raises its own kinds
        why = failure(error)
        if why.startswith("KeyboardInterrupt"):  # in a worker that is a thread
            raise KeyboardInterrupt from error
        more = f"; the workers' log is {log}" if log else ""
        raise UserError(
            f"{given}: the pipeline failed ({why}): the same command resumes from what is done{more}."
        ) from error
    if state != "DONE":
        raise UserError(f"{given}: the pipeline ended as {state}: see the runner's log.")
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_name(REUSED))["counters"]
    return sum(counter.result or 0 for counter in counters)


def convert_shard(file: str, job: conversion.Job) -> None:
    """Converts the images of one shard, on the worker, unless that is done."""
    conversion.import_for_writing()
    shard = pickle.loads(list_of(file, job).read_bytes())
    mark, kept = conversion.earlier(shard, job)
    if kept is not None:
        import_beam().metrics.Metrics.counter("facevae_jax", REUSED).inc(kept.images)
        return
    with images.converting((image.file for image in shard.members), job.task, threads=job.threads) as stream:
        conversion.write_shard(shard, job, mark, stream, advance=lambda count: None)


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
