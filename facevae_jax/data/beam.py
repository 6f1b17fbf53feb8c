"""Preparation by many machines: the conversion of shards as an Apache Beam pipeline.

The unit of work is a shard. For each there is a file with the list of its images, so that what travels through the
pipeline are names of files: runners limit the size of what is submitted. A worker that is given a shard writes it
aside, gives it its name when it is whole, and then writes its note; a runner may therefore give the same shard to
several workers, one after the other or at once. The bytes are those of `conversion.convert_layout`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from facevae_jax.data import builder, images, remote
from facevae_jax.data.archives import TarMember, ZipMember
from facevae_jax.data.beam_runners import (
    failure,
    import_beam,
    make_runner,
    parse_options,
    threads_per_worker,
    workers_log,
)
from facevae_jax.data.conversion import Outcome, Shard, fingerprint, plan_shards, read_finished, read_note, write_shard
from facevae_jax.data.layouts import Layout, SourceImage
from facevae_jax.data.locations import is_remote, location, written_aside
from facevae_jax.data.records import Record, import_for_writing, reason
from facevae_jax.errors import UserError
from facevae_jax.files import write_json

PLAN = "plan"  # folder of the lists of images, beside the notes
METRICS = "facevae_jax"  # namespace of the counters
TAKEN_OVER = "images_taken_over"

_MEMBERS: Mapping[str, Any] = {kind.__name__: kind for kind in (ZipMember, TarMember, Record)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker must know; it is sent to other machines."""

    task: images.Task
    attributes: list[str]
    folder: str  # of the shards
    notes: str
    plan: str
    threads: int


def prepare_dataset(
    layout: Layout,
    *,
    data_dir: str | os.PathLike[str],
    name: str,
    resolution: int,
    options: str,
    workers: int | None = None,
    on_bad_image: builder.Policy = "error",
) -> builder.Prepared:
    """As `builder.prepare_dataset`, by a Beam pipeline; `data_dir` may be a URL such as gs://bucket/folder.

    Args:
      layout: the images, which every worker finds at the same paths.
      data_dir: where prepared datasets are, by the same name for every worker.
      name: of the dataset.
      resolution: pixels along one side.
      options: Beam's, as on a command line; empty: one worker on this machine.
      workers: threads of each of Beam's workers; by default as many as fit its share of this machine's cores.
      on_bad_image: as of `builder.prepare_dataset`.

    Raises:
      UserError: Beam is not installed, its options are wrong, the pipeline failed, or what `builder.prepare_dataset`
        raises.
    """
    parsed = parse_options(options)
    prepare = remote.prepare_dataset if is_remote(data_dir) else builder.prepare_dataset
    return prepare(
        layout,
        data_dir=data_dir if is_remote(data_dir) else location(data_dir).absolute(),
        name=name,
        resolution=resolution,
        workers=workers or threads_per_worker(parsed),
        on_bad_image=on_bad_image,
        convert=functools.partial(convert_layout, options=parsed),
    )


def convert_layout(
    layout: Layout,
    task: images.Task,
    *,
    folder: pathlib.Path,
    notes: pathlib.Path,
    name: str,
    workers: int,
    options: Any,
) -> Outcome:
    """As `conversion.convert_layout`, by a pipeline with these `PipelineOptions`.

    Raises:
      UserError: the pipeline failed.
    """
    import_for_writing()  # also for workers that are threads of this process
    started = time.monotonic()
    plan = notes.parent / PLAN
    if not is_remote(plan):
        plan.mkdir(exist_ok=True)
        for unfinished in folder.glob(".*.tmp"):  # of workers that were killed
            unfinished.unlink()
    shards = {shard.file_name(name): shard for shard in plan_shards(layout, resolution=task.resolution)}
    for file, shard in shards.items():
        with written_aside(plan / file) as aside:
            aside.write_bytes(encode_shard(shard))
    job = Job(
        task=task,
        attributes=[attribute.name for attribute in layout.attributes],
        folder=os.fspath(folder),
        notes=os.fspath(notes),
        plan=os.fspath(plan),
        threads=workers,
    )
    taken_over = run_pipeline(list(shards), job, options)
    outcome = Outcome([], taken_over=taken_over)
    for file, shard in shards.items():
        try:
            outcome.shards.append((shard, read_note(notes / f"{file}.json")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{notes / file}.json is not there after the pipeline has ended ({reason(error)}): --data_dir must be "
                "the same place for this machine and for every worker."
            ) from error
    outcome.seconds = time.monotonic() - started
    return outcome


def run_pipeline(files: Sequence[str], job: Job, options: Any) -> int:
    """Converts the shards of these file names; the number of images that a pass before had converted.

    Raises:
      UserError: the pipeline cannot be submitted, or failed.
    """
    beam = import_beam()
    given = shlex.join(options._flags)
    try:
        pipeline = beam.Pipeline(runner=make_runner(options), options=options)
        _ = pipeline | beam.Create(files) | "convert" >> beam.Map(convert_shard, job=job)
    except (ValueError, ImportError) as error:  # what Beam says of options that do not fit together
        raise UserError(f"--beam_options={given!r}: {reason(error)}") from error
    result, log = None, ""
    try:
        with workers_log(options) as log:
            result = pipeline.run()
            state = result.wait_until_finish()
    except KeyboardInterrupt:
        if result is not None:  # a service goes on without this process
            result.cancel()
        raise
    except Exception as error:  # each runner raises its own kinds
        if failure(error).startswith("KeyboardInterrupt"):  # which ended a worker that is a thread
            raise KeyboardInterrupt from error
        more = f"; what the workers say is in {log}" if log else ""
        raise UserError(
            f"--beam_options={given!r}: the pipeline failed ({failure(error)}): put that right and run the same "
            f"command again, which goes on from what is done{more}."
        ) from error
    if state != "DONE":
        raise UserError(f"--beam_options={given!r}: the pipeline ended as {state}: see the runner's log.")
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_name(TAKEN_OVER))["counters"]
    return sum(counter.result or 0 for counter in counters)


def convert_shard(file: str, job: Job) -> None:
    """Converts the images of one shard, unless that is done; on the worker.

    Raises:
      OSError, RuntimeError: it cannot be written.
    """
    metrics = import_beam().metrics.Metrics
    import_for_writing()
    target, note = location(job.folder) / file, location(job.notes) / f"{file}.json"
    shard = decode_shard((location(job.plan) / file).read_bytes())
    mark = fingerprint(shard, job.task, job.attributes)
    finished = read_finished(target, note, mark)
    if finished is not None:
        metrics.counter(METRICS, TAKEN_OVER).inc(finished.images)
        return
    members = (image.file for image in shard.members)
    with written_aside(target) as aside, images.converting(members, job.task, threads=job.threads) as stream:
        progress = tqdm(disable=True)
        made = write_shard(aside, shard, stream, mark=mark, attributes=job.attributes, progress=progress)
    with written_aside(note) as aside:
        write_json(aside, made._asdict())
    metrics.counter(METRICS, "images_written").inc(made.images)
    metrics.counter(METRICS, "images_bad").inc(len(made.bad))


def encode_shard(shard: Shard) -> bytes:
    """The shard as JSON, with absolute paths."""
    members = [
        (
            image.name,
            [str(image.file.absolute())]
            if isinstance(image.file, pathlib.Path)
            else [type(image.file).__name__, *image.file],
            image.attributes,
        )
        for image in shard.members
    ]
    return json.dumps((*shard[:3], members)).encode()


def decode_shard(content: bytes) -> Shard:
    """What `encode_shard` has encoded."""
    split, number, of, members = json.loads(content)
    return Shard(
        split,
        number,
        of,
        [
            SourceImage(name, _MEMBERS[kind](*fields) if fields else pathlib.Path(kind), tuple(attributes))
            for name, (kind, *fields), attributes in members
        ],
    )
