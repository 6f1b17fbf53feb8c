"""Whole runs beside the step alone: what the feeds, logging, evaluation and checkpoints cost."""

import contextlib
import dataclasses
import io
import itertools
import pathlib
import tempfile
from typing import Any, Literal

from benchmarks.suites.timing import Options, image_rates, medians, seconds_each
from benchmarks.suites.training import FixedBatch, on_drawn_faces
from facevae_jax.config import RunConfig
from facevae_jax.training import loop
from facevae_jax.training.telemetry import read_metrics

FEEDS: tuple[Literal["resident", "streamed"], ...] = ("resident", "streamed")
# As a run on FFHQ evaluates, draws pictures and saves. There are fewer drawn faces, so that making them takes seconds,
# and several epochs between evaluations.
IMAGES_BETWEEN_EVALUATIONS = 60_000
VALIDATION_IMAGES = 1024
MIN_STEPS = 6
MIN_LOG_LINES = 3  # the first does not count: its dispatches measure how long a step takes


def run(options: Options) -> dict[str, Any]:
    """Trains by `loop.train` with each feed, in turns with steps on one fixed batch."""
    train, images = options.config.train, max(options.images, options.config.train.batch_size)
    validation = min(VALIDATION_IMAGES, images)
    step = FixedBatch(options.config).start()
    steps = max(MIN_STEPS, round(options.seconds / seconds_each(step.run, seconds=options.seconds)))
    with tempfile.TemporaryDirectory() as folder:
        config = on_drawn_faces(
            options.config,
            data_dir=folder,
            train=images,
            validation=validation,
            steps=steps,
            log_every_steps=max(1, min(train.log_every_steps, steps // MIN_LOG_LINES)),
            evaluate_every_epochs=max(1, round(IMAGES_BETWEEN_EVALUATIONS / images)),
            tensorboard=False,
        )
        values: dict[str, list[float]] = {name: [] for name in ("step", *FEEDS)}
        outside: dict[str, list[float]] = {feed: [] for feed in FEEDS}
        for number in range(options.rounds):
            values["step"].append(step.units * steps / step.run(steps))
            for feed in FEEDS:
                rate, share = run_with(config, feed, pathlib.Path(folder, f"{feed}-{number}"))
                values[feed].append(rate)
                outside[feed].append(share)
    # Within a round, as neighbors in time see the same load.
    ratios = {
        f"{feed}_to_step": [whole / alone for whole, alone in zip(values[feed], values["step"], strict=True)]
        for feed in FEEDS
    }
    return {
        "what": f"whole runs of {steps} steps (compiled anew each time, evaluated, saved) beside steps on one fixed "
        "batch: images/s of the training dispatches with their wait for data, and the share of the time since the "
        "first step that is spent neither in them nor in evaluation",
        **medians(ratios),
        "outside_dispatches_share": medians(outside),
        **image_rates(values),
        **{f"{name}_all": repeated for name, repeated in ratios.items()},
        "outside_dispatches_share_all": outside,
        "steps": steps,
        "train_images": images,
        "validation_images": validation,
    }


def run_with(config: RunConfig, feed: Literal["resident", "streamed"], workdir: pathlib.Path) -> tuple[float, float]:
    """Images/s of a whole run's training dispatches, and the share of its time outside dispatches and evaluation."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, feed=feed))
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config, workdir)
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    images, seconds = 0, 0.0
    for before, line in itertools.pairwise(lines):
        window = (line["step"] - before["step"]) * config.train.batch_size
        images += window
        seconds += window / line["images_per_second"]
    return images / seconds, lines[-1]["outside"]
