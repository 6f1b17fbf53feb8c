"""The training loop: from a config and a workdir to a trained model."""

import contextlib
import dataclasses
import math
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from facevae_jax.config import RunConfig
from facevae_jax.core import hosts, numerics
from facevae_jax.core.errors import UserError
from facevae_jax.data.arrays import GivenImages
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.feed import Feed, put
from facevae_jax.objective import bits_per_dim
from facevae_jax.training import workdir as workdirs
from facevae_jax.training.alarms import Alarms
from facevae_jax.training.boards import open_boards
from facevae_jax.training.checkpoints import Checkpoints, steps_in
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.feeds import check_batch_size, check_split_size, make_feed
from facevae_jax.training.optimizer import make_schedule
from facevae_jax.training.pace import Schedule, Skips, Window, dispatch_length, figures
from facevae_jax.training.pictures import PictureWriter
from facevae_jax.training.setup import TrainSetup, TrainState, make_mesh, replicated
from facevae_jax.training.start import check_data, opened, start_state
from facevae_jax.training.step import compile_train_steps
from facevae_jax.training.telemetry import Telemetry, log, log_error
from facevae_jax.training.watchdog import Watchdog

ESTIMATE_AFTER = 4.0  # seconds of training: the first steps are slower than the others
SHOWN_GROUPS = 8  # of latents, whose rates a line of the log has
GIVEN_IMAGES = "data"  # in the workdir: the images that a program gave


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """The parts of one run, which `train` makes."""

    setup: TrainSetup
    schedule: Schedule
    learning_rate: optax.Schedule
    split: str  # that is evaluated
    evaluator: Evaluator
    alarms: Alarms
    checkpoints: Checkpoints
    telemetry: Telemetry
    pictures: PictureWriter
    watchdog: Watchdog
    should_stop: Callable[[int], bool]
    window: Window = dataclasses.field(default_factory=Window)
    skips: Skips = dataclasses.field(default_factory=Skips)
    training_loss: float | None = None  # of the last log line

    def run(self, state: TrainState, feed: Feed | None, *, evaluated: bool, started: float) -> TrainState:
        """Trains to the schedule's end, or until `should_stop`.

        The order is a contract. Advance; log, which needs the window's metrics; evaluate; checkpoint, which saves the
        score. Whoever resumes from a checkpoint has therefore logged all that it holds, and evaluated it unless that
        was cut short, which `evaluated` says.
        """
        step, seconds_per_step, told = int(state.step), 0.0, False
        if step >= self.schedule.total and evaluated:
            log(f"nothing is left to do: the run is at step {step:,} of {self.schedule.total:,}")
        compiled = self._compile(state, feed) if feed else None
        self.watchdog.heartbeat()
        stopped = not evaluated and not self._evaluate_and_save(state, step)
        while feed and compiled and not stopped and step < self.schedule.total:
            boundary = self.schedule.next_boundary(step)
            count = min(dispatch_length(seconds_per_step, feed.spec.capacity), boundary - step)
            state, seconds = self._advance(compiled, feed, state, step, count)
            if not seconds_per_step:
                log(f"first step after {time.time() - started:.1f} s")
            elif not told and self.telemetry.training_seconds >= ESTIMATE_AFTER:
                told = True
                log(f"about {self.telemetry.time_left} for the steps to come, beside evaluations")
            step += count
            # The same in all processes, or they would choose other dispatches and stop at other steps.
            seconds_per_step, stop = hosts.agree(seconds / count, self.should_stop(step))
            stopped = bool(stop)
            evaluates = self.schedule.evaluates(step)
            saves = evaluates or stopped or step % self.schedule.checkpoint_every == 0
            if saves or step % self.schedule.log_every == 0:
                self._log(step)
            if evaluates and not stopped:
                stopped = not self._evaluate_and_save(state, step)
            elif saves:
                self.checkpoints.save(state, step=step, loss=None, evaluated=not evaluates)
            self.watchdog.heartbeat()
        return state

    def _compile(self, state: TrainState, feed: Feed) -> jax.stages.Compiled:
        started = time.perf_counter()
        compiled = compile_train_steps(self.setup, state, feed.spec)
        temporaries = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0) / 2**20
        log(f"compiled in {time.perf_counter() - started:.1f} s: {temporaries:,.0f} MiB of temporaries a device")
        return compiled

    def _advance(
        self, compiled: jax.stages.Compiled, feed: Feed, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, float]:
        started = time.perf_counter()
        chunk = feed.chunk(step, count)
        waited = time.perf_counter() - started
        state, metrics = compiled(state, chunk, put(np.asarray(count, np.int32), replicated(self.setup.mesh)))
        self.skips.add(jax.block_until_ready(metrics), count)
        seconds = time.perf_counter() - started
        self.watchdog.heartbeat(step + count)
        self.window.add(metrics, count, seconds)
        self.telemetry.advance(count, seconds=seconds, data_seconds=waited)
        if found := self.skips.diverged(self.setup.config.train):
            self.checkpoints.wait()
            last = self.checkpoints.newest_finite()
            good = "there is no checkpoint" if last is None else f"the last good one is {self.checkpoints.path(last)}"
            what, remedy = found
            raise UserError(f"{what}, to {step + count:,}, which were skipped; {good}: {remedy}.")
        return state, seconds

    def _log(self, step: int) -> None:
        values = self.window.fetch(self.setup.config.train.batch_size)
        self.training_loss = values["loss"]
        values["epoch"] = step / self.schedule.epoch
        values["learning_rate"] = float(self.learning_rate(step - 1))  # of the last step
        values["data_wait"], values["outside"] = self.telemetry.data_wait, self.telemetry.outside
        self.telemetry.write("train", step, values)
        log(
            f"step {step:>7,}/{self.schedule.total:,}  train       {describe(values)}  "
            f"data wait {values['data_wait']:.1%}  {self.telemetry.time_left} left"
        )

    def _evaluate_and_save(self, state: TrainState, step: int) -> bool:
        """Evaluates and saves; False where a stop was asked for before the evaluation was finished."""
        loss = self._evaluate(state, step)
        self.checkpoints.save(state, step=step, loss=loss, evaluated=loss is not None)
        return loss is not None

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """The loss of the evaluation split; None where a stop was asked for meanwhile."""
        started = time.perf_counter()

        def keep_going() -> bool:
            self.watchdog.heartbeat()
            (stop,) = hosts.agree(self.should_stop(step))
            return not stop

        evaluation = self.evaluator(state, keep_going)
        if evaluation is None:
            return None
        loss, units, sides, active = jax.device_get(evaluation)
        values = figures(loss)
        found = np.unique(sides)
        if 1 < len(found) < len(sides):
            values["resolutions"] = [f"{side}x{side}" for side in found]
            values["rates_by_resolution"] = [float(loss.rates[sides == side].sum()) for side in found]
        if len(units):
            values["active_units"] = int(active.sum())
        likelihood = self.setup.likelihood
        if likelihood.discrete or self.setup.config.data.dequantize:
            values["bits_per_dim"] = bits_per_dim(
                values["negative_elbo"], dimensions=likelihood.dimensions, discrete=likelihood.discrete
            )
        self.telemetry.write("evaluation", step, {"split": self.split, "epoch": step / self.schedule.epoch, **values})
        if hosts.is_main():
            self.pictures(state, step=step)
        values["seconds"] = time.perf_counter() - started
        self.telemetry.evaluated(values["seconds"])
        name = "eval train" if self.split == "train" else self.split  # unlike the lines of training
        log(f"step {step:>7,}/{self.schedule.total:,}  {name:<10}  {describe(values)}")
        warming = step <= max(self.setup.config.train.warmup_steps, self.setup.config.objective.kl_warmup_steps)
        warming = warming or not math.isfinite(values["loss"])  # the skipped steps tell
        for line in self.alarms.check(values, self.training_loss, latent_units=int(units.sum()), warming=warming):
            log(f"alarm: {line}")
        return values["loss"]


def describe(values: dict[str, Any]) -> str:
    """One line of the figures a reader wants."""
    line = f"loss {values['loss']:.2f}  mse {values['mse']:.5f}  kl {values['kl']:.2f} nats"
    if "rates_by_resolution" in values:
        pairs = zip(values["resolutions"], values["rates_by_resolution"], strict=True)
        line += f" ({' + '.join(f'{rate:.1f} at {name}' for name, rate in pairs)})"
    elif 0 < len(values.get("rates", [])) <= SHOWN_GROUPS:
        line += f" ({' + '.join(f'{rate:.1f}' for rate in values['rates'])})"
    if "bits_per_dim" in values:
        line += f"  {values['bits_per_dim']:.3f} bits/dim"
    if values.get("skipped"):
        line += f"  {values['skipped']:,.0f} skipped: not finite"
    if "too_large" in values:
        line += f"  {values['too_large']:,.0f} skipped: gradient too large"
    if "images_per_second" in values:
        line += f"  {values['images_per_second']:,.0f} images/s"
    if "seconds" in values:
        line += f"  {values['seconds']:.1f} s"
    return line


def train(
    config: RunConfig,
    workdir: str | pathlib.Path,
    *,
    images: GivenImages | None = None,
    should_stop: Callable[[int], bool] = lambda step: False,
    started: float | None = None,
    accept_new_data: bool = False,
) -> TrainState:
    """Trains, or resumes, the run in `workdir`, and returns the final state.

    With several processes (see `hosts.join`) each calls this, with the same config and a workdir that all can reach.

    Args:
      config: of the run.
      workdir: directory for checkpoints, pictures, metrics and `config.json`; created if missing.
      images: that a program gives, for the dataset `arrays` in `workdir`; in a run of one process.
      should_stop: asked with the number of finished steps after each dispatch and while evaluating; True in any
        process saves and returns early in all.
      started: Unix time from which the first step is counted; the call's by default.
      accept_new_data: resume although the dataset was prepared anew with other images.

    Raises:
      UserError: anything that the user can fix, before any work is lost.
    """
    numerics.check()
    started = time.time() if started is None else started
    mesh = make_mesh()
    with workdirs.explained(workdir), contextlib.ExitStack() as stack:
        directory = hosts.together(lambda: workdirs.open_workdir(config, workdir, stack))
        resumes = bool(steps_in(directory))
        check_batch_size(config, mesh, resumes=resumes)
        if images is not None:
            check_split_size(config, images.training_images, mesh, resumes=resumes)
            images.keep(directory / GIVEN_IMAGES, replace=accept_new_data or not resumes)
        dataset = hosts.together(lambda: opened(open_dataset(config.data)))
        check_split_size(config, dataset.sizes["train"], mesh, resumes=resumes)
        new = hosts.together(lambda: check_data(directory, dataset, accept_new=accept_new_data))
        schedule = Schedule.of(config, images=dataset.sizes["train"])
        setup = TrainSetup.of(config, mesh, total_steps=schedule.total)
        checkpoints = stack.enter_context(Checkpoints(directory, forget_scores=new))
        watchdog = stack.enter_context(Watchdog(config.train.watchdog_seconds))
        state, evaluated = start_state(setup, dataset, checkpoints, watchdog)
        step = int(state.step)
        watchdog.step = step
        feed = None
        if step < schedule.total:
            log(schedule.describe(config.train))
            feed = make_feed(config, dataset.images("train"), mesh, first_step=step)
            stack.callback(feed.close)
        boards = hosts.together(lambda: open_boards(config, directory, first_step=step) if hosts.is_main() else [])
        telemetry = Telemetry(directory, config, boards, first_step=step, total_steps=schedule.total)
        stack.enter_context(telemetry)
        train_images, evaluated_images = dataset.images("train"), dataset.images(dataset.evaluation_split)
        trainer = Trainer(
            setup=setup,
            schedule=schedule,
            learning_rate=make_schedule(config.train, total_steps=schedule.total),
            split=dataset.evaluation_split,
            evaluator=Evaluator(setup, evaluated_images),
            alarms=Alarms(evaluated_images),
            checkpoints=checkpoints,
            telemetry=telemetry,
            pictures=stack.enter_context(
                PictureWriter(setup, train_images, evaluated_images, directory, telemetry.picture)
            ),
            watchdog=watchdog,
            should_stop=should_stop,
        )
        evaluated = evaluated or not schedule.evaluates(step)
        with alone_on_failure(watchdog):
            return trainer.run(state, feed, evaluated=evaluated, started=started)


@contextlib.contextmanager
def alone_on_failure(watchdog: Watchdog) -> Iterator[None]:
    """Ends one process of several at once where it fails: it must not wait for the others, which wait for it."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):  # mostly raised in all processes alike
            if hosts.is_main():
                log_error(str(error))
            hosts.leave(2)
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if hosts.is_runtime_error(error):
            reason = " ".join(str(error).split())[:200]
            log_error(
                f"{who} lost the others after step {watchdog.step:,} ({reason}): start all again; the same command "
                "resumes from the last checkpoint."
            )
            hosts.leave(hosts.START_AGAIN)
        traceback.print_exc()
        log_error(f"{who} ends after step {watchdog.step:,} for the reason above, and all others with it.")
        hosts.leave(1)
