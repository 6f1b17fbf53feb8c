"""Preparation by many machines: the conversion of shards as an Apache Beam pipeline.

The unit of work is a shard. For each there is a file with the list of its images, so that only file names travel
through the pipeline: runners limit the size of what is submitted. A worker writes the shard under a temporary name,
renames it when it is complete, and then writes its manifest; so a runner may give the same shard to several workers,
one after the other or at once. The bytes are those of `conversion.convert_layout`.
"""

import functools
import os
import pickle
import shlex
import time
from typing import Any, NamedTuple

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import AnyPath, reason, write_json
from facevae_jax.data.layouts.types import Layout
from facevae_jax.data.prepared import beam_runners, builder, conversion
from facevae_jax.data.prepared.locations import is_remote, location, uploading
from facevae_jax.data.prepared.records import import_for_writing
from facevae_jax.data.sources.images import Task, converting

REUSED = "images_reused"  # name of a counter


class Job(NamedTuple):
    """What every worker must know; it is sent to other machines."""

    task: Task
    attributes: list[str]
    folder: str  # of the shards
    manifests: str  # the folder of the manifests, and of the lists of images
    threads: int


def prepare_dataset(
    layout: Layout, *, data_dir: str | os.PathLike[str], options: str, workers: int | None = None, **others: Any
) -> builder.Prepared:
    """As `builder.prepare_dataset`, by a Beam pipeline; the images and `data_dir` are the same paths for every worker.

    `data_dir` may be a URL such as gs://bucket/folder. `options` are Beam's, as on a command line; empty: one worker on
    this machine. `workers` are threads of each worker, by default as many as fit its share of this machine's cores.

    Raises:
      UserError: Beam is not installed, its options are wrong, the pipeline failed, or as `builder.prepare_dataset`.
    """
    parsed = beam_runners.parse_options(options)
    return builder.prepare_dataset(
        layout,
        data_dir=data_dir if is_remote(data_dir) else location(data_dir, name="--data_dir").absolute(),
        workers=workers or beam_runners.threads_per_worker(parsed),
        convert=functools.partial(convert_layout, options=parsed),
        **others,
    )


def convert_layout(
    layout: Layout, task: Task, *, folder: AnyPath, manifests: AnyPath, name: str, workers: int, options: Any
) -> conversion.Outcome:
    """As `conversion.convert_layout`, by a pipeline with these `PipelineOptions`. Raises UserError: it failed."""
    import_for_writing()  # also for workers that are threads of this process
    started = time.monotonic()
    if not is_remote(folder):
        for unfinished in folder.glob(".*.tmp"):  # of workers that were killed
            unfinished.unlink()
    shards = {shard.file_name(name): shard for shard in conversion.plan_shards(layout, resolution=task.resolution)}
    for file, shard in shards.items():
        with uploading(manifests / f"{file}.list") as listed:
            listed.write_bytes(pickle.dumps(shard._replace(members=list(shard.members))))
    attributes = [attribute.name for attribute in layout.attributes]
    job = Job(task, attributes, folder=os.fspath(folder), manifests=os.fspath(manifests), threads=workers)
    outcome = conversion.Outcome([], reused=run_pipeline(list(shards), job, options))
    for file, shard in shards.items():
        try:
            outcome.shards.append((shard, conversion.read_manifest(manifests / f"{file}.json")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{manifests / file}.json is missing ({reason(error)}): all workers need the same --data_dir."
            ) from error
    outcome.seconds = time.monotonic() - started
    return outcome


def run_pipeline(files: list[str], job: Job, options: Any) -> int:
    """Converts the shards of these names; how many images were converted before. Raises UserError: it failed."""
    beam = beam_runners.import_beam()
    given = f"--beam_options={shlex.join(options._flags)!r}"
    try:
        pipeline = beam.Pipeline(runner=beam_runners.make_runner(options), options=options)
        _ = pipeline | beam.Create(files) | "convert" >> beam.Map(convert_shard, job=job)
    except (ValueError, ImportError) as error:  # options that do not fit together
        raise UserError(f"{given}: {reason(error)}") from error
    result, log = None, ""
    try:
        with beam_runners.workers_log(options) as log:
            result = pipeline.run()
            state = result.wait_until_finish()
    except KeyboardInterrupt:
        if result is not None:  # a service would continue without this process
            result.cancel()
        raise
    except Exception as error:  # each runner raises its own kinds
        why = beam_runners.failure(error)
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


def convert_shard(file: str, job: Job) -> None:
    """Converts the images of one shard, on the worker, unless that is done."""
    import_for_writing()
    manifests = location(job.manifests, name="--data_dir")
    target, manifest = location(job.folder, name="--data_dir") / file, manifests / f"{file}.json"
    shard: conversion.Shard = pickle.loads((manifests / f"{file}.list").read_bytes())
    mark = conversion.fingerprint(shard, job.task, job.attributes)
    if finished := conversion.read_finished(target, manifest, mark):
        beam_runners.import_beam().metrics.Metrics.counter("facevae_jax", REUSED).inc(finished.images)
        return
    members = (image.file for image in shard.members)
    with uploading(target) as local, converting(members, job.task, threads=job.threads) as stream:
        made = conversion.write_shard(local, shard, stream, mark=mark, attributes=job.attributes)
    with uploading(manifest) as local:
        write_json(local, made._asdict())
