"""Real runs beside the step alone: what the feeds, the logging, the evaluation and the checkpoints cost."""

import contextlib
import dataclasses
import io
import itertools
import pathlib
import tempfile
from typing import Any, Literal

from benchmarks.suites.options import Options
from benchmarks.suites.timing import image_rates, median_or_none, medians, seconds_each
from benchmarks.suites.training import FixedBatch
from facevae_jax.config import RunConfig
from facevae_jax.data.pixels import open_splits
from facevae_jax.training import loop
from facevae_jax.training.telemetry import read_metrics

FEEDS: tuple[Literal["resident", "streamed"], ...] = ("resident", "streamed")
# A run on FFHQ evaluates, draws pictures and saves so many images apart. The drawn faces are fewer, so that making them
# takes seconds, and are passed over several times in between.
IMAGES_BETWEEN_EVALUATIONS = 60_000
VALIDATION_IMAGES = 1024
MIN_STEPS = 6
MIN_LOG_LINES = 3  # the first of them is not counted: it has the dispatches that find out how long a step is


def run(options: Options) -> dict[str, Any]:
    """Trains by `loop.train` with each feed, in turns with steps on one fixed batch."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(options, data_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):
            open_splits(config.data)  # draws the faces, before anything is timed
        step = FixedBatch(config).start()
        steps = max(MIN_STEPS, round(options.seconds / seconds_each(step.run, seconds=options.seconds)))
        config = with_steps(config, steps)
        values: dict[str, list[float]] = {name: [] for name in ("step", *FEEDS)}
        outside: dict[str, list[float | None]] = {feed: [] for feed in FEEDS}
        for number in range(options.rounds):
            values["step"].append(step.units * steps / step.run(steps))
            for feed in FEEDS:
                rate, share = train(config, feed, pathlib.Path(folder, f"{feed}-{number}"))
                values[feed].append(rate)
                outside[feed].append(share)
    # Of the same round: neighbours in time.
    ratios = {
        f"{feed}_to_step": [mine / alone for mine, alone in zip(values[feed], values["step"], strict=True)]
        for feed in FEEDS
    }
    return {
        "what": f"whole runs of {steps} steps (compiled anew each time, evaluated, saved) beside steps on one fixed "
        "batch: images/s of the training dispatches with their wait for data, and the share of the time since the "
        "first step that is spent neither in them nor in evaluation",
        **medians(ratios),
        "outside_dispatches_share": {feed: median_or_none(shares) for feed, shares in outside.items()},
        **image_rates(values),
        **{f"{name}_all": repeated for name, repeated in ratios.items()},
        "outside_dispatches_share_all": outside,
        "steps": steps,
        "images_between_evaluations": IMAGES_BETWEEN_EVALUATIONS,
        "train_images": config.data.synthetic_train_images,
        "validation_images": config.data.synthetic_validation_images,
    }


def run_config(options: Options, *, data_dir: str) -> RunConfig:
    """The config on drawn faces, evaluated as often as on FFHQ."""
    config = options.config
    images = max(options.images, config.train.batch_size)
    data = dataclasses.replace(
        config.data,
        name="synthetic",
        data_dir=data_dir,
        synthetic_train_images=images,
        synthetic_validation_images=min(VALIDATION_IMAGES, images),
    )
    epochs = max(1, round(IMAGES_BETWEEN_EVALUATIONS / images))
    train = dataclasses.replace(config.train, evaluate_every_epochs=epochs, tensorboard=False)
    return dataclasses.replace(config, data=data, train=train)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config for so many steps, logged as it says but at least `MIN_LOG_LINES` times."""
    log_every = max(1, min(config.train.log_every_steps, steps // MIN_LOG_LINES))
    train = dataclasses.replace(config.train, steps=steps, log_every_steps=log_every)
    return dataclasses.replace(config, train=train)


def train(
    config: RunConfig, feed: Literal["resident", "streamed"], workdir: pathlib.Path
) -> tuple[float, float | None]:
    """Images/s of a whole run's training dispatches, and its share outside dispatches and evaluation."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, feed=feed))
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config, workdir)
    lines = [line for line in read_metrics(workdir) if line["kind"] == "train"]
    images, seconds = 0, 0.0
    for before, line in itertools.pairwise(lines):
        window = (line["step"] - before["step"]) * config.train.batch_size
        images += window
        seconds += window / line["images_per_second"]
    return images / seconds, lines[-1].get("outside")
