"""The training loop: from a config and a workdir to a trained model."""

import contextlib
import errno
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from facevae_jax import hosts
from facevae_jax.config import RunConfig
from facevae_jax.data.batches import Feed
from facevae_jax.data.pixels import Splits, open_splits
from facevae_jax.errors import UserError, expand_home, make_writable_directory
from facevae_jax.models.vae import forward_flops
from facevae_jax.objective import bits_per_dim
from facevae_jax.training import workdir as workdirs
from facevae_jax.training.alarms import Alarms
from facevae_jax.training.checkpoints import Checkpoints, Restored
from facevae_jax.training.communication import bytes_per_step
from facevae_jax.training.evaluation import Evaluator, Painter
from facevae_jax.training.feeds import check_batch_size, check_split_size, make_feed
from facevae_jax.training.pace import Schedule, Window, dispatch_length
from facevae_jax.training.pca import fit_pca
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import (
    TrainState,
    abstract_state,
    create_state,
    make_model,
    make_optimizer,
    parameter_count,
)
from facevae_jax.training.step import Trainer, compile_train_steps
from facevae_jax.training.telemetry import Telemetry, say, say_error
from facevae_jax.training.watchdog import START_AGAIN, Watchdog


class Loop:
    """One run's moving parts."""

    def __init__(
        self,
        trainer: Trainer,
        splits: Splits,
        feed: Feed,
        checkpoints: Checkpoints,
        telemetry: Telemetry,
        painter: Painter,
        watchdog: Watchdog,
        *,
        schedule: Schedule,
        mesh: Mesh,
        should_stop: Callable[[int], bool],
    ) -> None:
        """Takes what `train` has opened."""
        self.trainer, self.feed, self.schedule = trainer, feed, schedule
        self.checkpoints, self.telemetry, self.watchdog = checkpoints, telemetry, watchdog
        self.window = Window()
        self.evaluation_split = splits.evaluation_split
        self.evaluator = Evaluator(trainer, splits.evaluation, mesh)
        self.painter = painter
        self.steps_per_chunk = feed.capacity // trainer.config.train.accumulation
        self._should_stop, self._skipped_in_row = should_stop, 0
        self.alarms = Alarms(splits.evaluation, latent_dim=trainer.config.model.latent_dim)
        self._training_loss: float | None = None

    def run(self, state: TrainState, *, evaluated: bool, started: float) -> TrainState:
        """Trains to the schedule's end, or until `should_stop`.

        The order is a contract. Advance; log, which needs the window's metrics; evaluate, which puts the latents'
        moments into the state; checkpoint, which saves them and the score. Whoever resumes from a checkpoint has
        therefore logged all that it holds, and evaluated it unless that was cut short, which `evaluated` tells.
        """
        step, seconds_per_step = int(state.step), 0.0
        if step >= self.schedule.total and evaluated:
            say(f"nothing is left to do: the run is at step {step:,} of {self.schedule.total:,}")
        compiled = self._compile(state, step) if step < self.schedule.total else None
        self.watchdog.beat()
        if not evaluated:
            state, _ = self._evaluate(state, step) or (state, None)
        stopped = False
        while compiled is not None and step < self.schedule.total and not stopped:
            boundary = self.schedule.next_boundary(step)
            count = min(dispatch_length(seconds_per_step, self.steps_per_chunk), boundary - step)
            state, seconds = self._advance(compiled, state, step, count)
            if not seconds_per_step:
                say(f"first step after {time.time() - started:.1f} s")
            step += count
            # The same in all processes, or they would choose other dispatches and stop at other steps.
            seconds_per_step, stop = hosts.agree(seconds / count, self._should_stop(step))
            stopped = bool(stop)
            evaluates = self.schedule.evaluates(step)
            saves = evaluates or stopped or step % self.schedule.checkpoint_every == 0
            if saves or step % self.schedule.log_every == 0:
                self._log(step)
            loss, unfinished = None, False
            if evaluates:
                evaluation = None if stopped else self._evaluate(state, step)
                stopped = unfinished = evaluation is None
                state, loss = evaluation or (state, None)
            if saves:
                self.checkpoints.save(state, step=step, loss=loss, evaluated=not unfinished)
            self.watchdog.beat()
        return state

    def fit(self, state: TrainState, images: np.ndarray, *, evaluated: bool) -> TrainState:
        """All of a run whose parameters are computed, not trained, which counts as one step."""
        if int(state.step) and evaluated:
            say("nothing is left to do: the components are there")
            return state
        if not int(state.step):
            started, train = time.perf_counter(), self.trainer.config.train
            params = fit_pca(images, self.trainer.config.model.latent_dim, seed=train.seed, beat=self.watchdog.beat)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
            state = state.replace(step=state.step + 1, params=jax.device_put(jax.device_get(params), shardings))
            seconds = time.perf_counter() - started
            say(f"{len(params['components']):,} components of {len(images):,} images in {seconds:.1f} s")
        evaluation = self._evaluate(state, 1)
        state, loss = evaluation or (state, None)
        self.checkpoints.save(state, step=1, loss=loss, evaluated=evaluation is not None)
        return state

    def _compile(self, state: TrainState, step: int) -> jax.stages.Compiled:
        started = time.perf_counter()
        chunk = self.feed.abstract_chunk()
        compiled = compile_train_steps(self.trainer, state, chunk, capacity=self.steps_per_chunk)
        memory = compiled.memory_analysis()
        # Not XLA's own analysis, which counts the body of a loop once. The gradients cost twice the forward pass.
        flops = 3 * forward_flops(self.trainer.config.model, self.trainer.config.data.resolution)
        say(
            f"compiled in {time.perf_counter() - started:.1f} s: {flops / 1e6:,.1f} MFLOP per image, "
            f"{getattr(memory, 'temp_size_in_bytes', 0) / 2**20:,.0f} MiB of temporaries a device"
        )
        if jax.device_count() > 1:
            gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) / 2**20
            sent = bytes_per_step(compiled.as_text() or "") / 2**20
            say(f"communication: {sent:,.2f} MiB a step and device, of which gradients {gradients:,.2f} MiB")
        return compiled

    def _advance(
        self, compiled: jax.stages.Compiled, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, float]:
        started = time.perf_counter()
        parts = self.trainer.config.train.accumulation
        chunk = self.feed.chunk(step * parts, count * parts)
        waited = time.perf_counter() - started
        state, metrics = compiled(state, chunk, np.int32(count))
        skipped = np.asarray(jax.block_until_ready(metrics).skipped)[:count]
        seconds = time.perf_counter() - started
        self.watchdog.beat(step + count)
        self.window.add(metrics, count, seconds)
        self.telemetry.advance(count, seconds=seconds, data_seconds=waited)
        self._check_skipped(skipped, step + count)
        return state, seconds

    def _check_skipped(self, skipped: np.ndarray, step: int) -> None:
        """Raises a UserError where too many steps in a row were skipped for a loss or gradient that is not finite."""
        learned = np.flatnonzero(skipped == 0)
        self._skipped_in_row = len(skipped) - learned[-1] - 1 if len(learned) else self._skipped_in_row + len(skipped)
        if self._skipped_in_row >= self.trainer.config.train.max_skipped_steps:
            self.checkpoints.wait()
            steps = self.checkpoints.steps()
            good = (
                f"the last good checkpoint is {self.checkpoints.path(steps[0])}" if steps else "no checkpoint was made"
            )
            raise UserError(
                f"the loss or its gradient was not finite in the last {self._skipped_in_row:,} steps, to {step:,}, "
                f"which were skipped; {good}: lower --config.train.learning_rate or set --config.train.clip_norm=1."
            )

    def _log(self, step: int) -> None:
        values = self.window.fetch(self.trainer.config.train.batch_size)
        self._training_loss = values["loss"]
        values["data_wait"], values["outside"] = self.telemetry.data_wait, self.telemetry.outside
        self.telemetry.write("train", step, values)
        say(
            f"step {step:>7,}/{self.schedule.total:,}  train       {describe(values)}  "
            f"data wait {values['data_wait']:.1%}  {self.telemetry.time_left} left"
        )

    def _evaluate(self, state: TrainState, step: int) -> tuple[TrainState, float] | None:
        """The state with its latents' moments, and the loss; None where a stop was asked for meanwhile."""
        started = time.perf_counter()

        def goes_on() -> bool:
            self.watchdog.beat()
            (stop,) = hosts.agree(self._should_stop(step))
            return not stop

        evaluation = self.evaluator(state, goes_on)
        if evaluation is None:
            return None
        loss, moments, active_units = jax.block_until_ready(evaluation)
        state = state.replace(latent_moments=moments)
        values = {name: float(value) for name, value in jax.device_get(loss)._asdict().items()}
        if self.trainer.config.model.kind == "vae":
            values["active_units"] = float(active_units)
        discrete = self.trainer.config.objective.is_discrete
        if discrete or self.trainer.config.data.dequantize:
            dimensions = self.trainer.dimensions
            values["bits_per_dim"] = bits_per_dim(values["negative_elbo"], dimensions=dimensions, discrete=discrete)
        self.telemetry.write("evaluation", step, {"split": self.evaluation_split, **values})
        if hosts.is_main():
            self.painter(state, step=step)
        values["seconds"] = time.perf_counter() - started
        self.telemetry.evaluated(values["seconds"])
        say(f"step {step:>7,}/{self.schedule.total:,}  {self.evaluation_split:<10}  {describe(values)}")
        for line in self.alarms.look(values, self._training_loss):
            say(f"alarm: {line}")
        return state, values["loss"]


def describe(values: dict[str, float]) -> str:
    """One line of the figures a reader wants."""
    line = f"loss {values['loss']:.2f}  mse {values['mse']:.5f}  kl {values['kl']:.2f} nats"
    if "bits_per_dim" in values:
        line += f"  {values['bits_per_dim']:.3f} bits/dim"
    if values.get("skipped"):
        line += f"  {values['skipped']:,.0f} skipped: not finite"
    if "images_per_second" in values:
        line += f"  {values['images_per_second']:,.0f} images/s"
    if "seconds" in values:
        line += f"  {values['seconds']:.1f} s"
    return line


def train(
    config: RunConfig,
    workdir: str | pathlib.Path,
    *,
    should_stop: Callable[[int], bool] = lambda step: False,
    started: float | None = None,
) -> TrainState:
    """Trains, or goes on with, the run in `workdir`, and returns the final state.

    With several processes (see `hosts.join`) each calls this, with the same config and a workdir that all can reach.

    Args:
      config: of the run.
      workdir: directory for checkpoints, pictures, metrics and `config.json`; created if missing.
      should_stop: asked with the number of finished steps after each dispatch and while evaluating; True in any
        process saves and returns early in all.
      started: Unix time from which the first step is counted; the call's by default.

    Raises:
      UserError: anything that the user can mend, before any work is lost.
    """
    started = time.time() if started is None else started
    mesh = make_mesh()
    check_batch_size(config, mesh)
    with explained(workdir), contextlib.ExitStack() as stack:
        directory = hosts.together(lambda: open_workdir(config, workdir, stack))
        splits = hosts.together(lambda: open_splits(config.data))
        check_split_size(config, len(splits.train), mesh)
        schedule = Schedule.of(config, images=len(splits.train))
        trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=schedule.total))
        checkpoints = stack.enter_context(Checkpoints(directory))
        state, evaluated = start_state(trainer, checkpoints, mesh)
        step = int(state.step)
        feed = make_feed(config, splits, mesh, first_step=step)
        stack.callback(feed.close)
        telemetry = stack.enter_context(
            Telemetry(
                directory,
                first_step=step,
                total_steps=schedule.total,
                batch_size=config.train.batch_size,
                tensorboard=config.train.tensorboard,
                silent=not hosts.is_main(),
            )
        )
        painter = stack.enter_context(Painter(trainer, splits.evaluation, directory))
        watchdog = stack.enter_context(Watchdog(config.train.watchdog_seconds, step=step))
        loop = Loop(
            trainer,
            splits,
            feed,
            checkpoints,
            telemetry,
            painter,
            watchdog,
            schedule=schedule,
            mesh=mesh,
            should_stop=should_stop,
        )
        evaluated = evaluated or not schedule.evaluates(step)
        if config.model.kind == "pca":
            return run_beside_others(lambda: loop.fit(state, splits.train, evaluated=evaluated), watchdog)
        return run_beside_others(lambda: loop.run(state, evaluated=evaluated, started=started), watchdog)


def run_beside_others(run: Callable[[], TrainState], watchdog: Watchdog) -> TrainState:
    """`run`, whose failure in one process of several ends that process at once, without waiting for the others."""
    try:
        return run()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):  # mostly raised in all processes alike
            if hosts.is_main():
                say_error(str(error))
            hosts.leave(2)
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if hosts.is_runtime_error(error):
            reason = " ".join(str(error).split())[:200]
            say_error(
                f"{who} lost the others after step {watchdog.step:,} ({reason}): start all again, the same command "
                "goes on from the last checkpoint."
            )
            hosts.leave(START_AGAIN)
        traceback.print_exc()
        say_error(f"{who} ends after step {watchdog.step:,} for the reason above, and all others with it.")
        hosts.leave(1)


@contextlib.contextmanager
def explained(workdir: str | pathlib.Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        reason = f"{error.filename or 'a file'} could not be written: {error.strerror}"
        raise UserError(f"--workdir={str(workdir)!r}: {reason}; mend that, and the same command goes on.") from error


def open_workdir(config: RunConfig, workdir: str | pathlib.Path, stack: contextlib.ExitStack) -> pathlib.Path:
    """The directory of the run, kept for this run alone until the stack is closed.

    Raises:
      UserError: it cannot be written to, holds another run, or one is going on there.
    """
    if not hosts.is_main():
        return expand_home(workdir, name="--workdir")
    directory = make_writable_directory(workdir, name="--workdir")
    stack.enter_context(workdirs.locked(directory))
    for line in workdirs.claim(directory, config):
        say(line)
    return directory


def start_state(trainer: Trainer, checkpoints: Checkpoints, mesh: Mesh) -> Restored:
    """The newest whole checkpoint's state, or a fresh one."""
    devices = jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"devices: {len(devices)} x {devices[0].device_kind}{processes}; convolutions: {trainer.model.execution.form}")
    abstract = abstract_state(trainer.config, trainer.model, trainer.optimizer, mesh)
    restored, notes = checkpoints.restore_newest(abstract)
    for note in notes:
        say(f"warning: {note}")
    if restored is not None:
        say(f"resuming from step {int(restored.state.step):,}")
        return restored
    state = create_state(trainer.config, trainer.model, trainer.optimizer, mesh)
    say(f"model: {parameter_count(state):,} parameters, counting batch statistics")
    return Restored(state, evaluated=True)
