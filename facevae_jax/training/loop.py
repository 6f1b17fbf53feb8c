"""The training loop: from a config and a workdir to a trained model."""

import contextlib
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from facevae_jax.config import RunConfig
from facevae_jax.data.batches import Feed, ResidentFeed, StreamedFeed, device_memory_budget
from facevae_jax.data.pixels import Splits, open_splits
from facevae_jax.data.plan import BatchPlan
from facevae_jax.errors import UserError, make_writable_directory
from facevae_jax.models.vae import forward_flops
from facevae_jax.objective import bits_per_dim
from facevae_jax.training import workdir as workdirs
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.evaluation import Evaluator, Painter
from facevae_jax.training.pace import Schedule, Window, dispatch_length
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import (
    TrainState,
    abstract_state,
    create_state,
    make_model,
    make_optimizer,
    parameter_count,
)
from facevae_jax.training.step import Trainer, compile_train_steps
from facevae_jax.training.telemetry import Telemetry, say


def check_batch_size(config: RunConfig, mesh: Mesh) -> None:
    """Raises a UserError unless the global batch can be cut evenly among the devices."""
    devices, batch_size = mesh.size, config.train.batch_size
    if batch_size % devices:
        near = max(devices, round(batch_size / devices) * devices)
        raise UserError(
            f"config.train.batch_size={batch_size} is not divisible by the {devices} devices: "
            f"take --config.train.batch_size={near}."
        )


def check_split_size(config: RunConfig, images: int, mesh: Mesh) -> None:
    """Raises a UserError unless the training images make at least one batch."""
    if config.train.batch_size > images:
        largest = images // mesh.size * mesh.size
        remedy = (
            f"take --config.train.batch_size={largest}" if largest else f"{mesh.size} devices need at least as many"
        )
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} is more than the {images} training images: {remedy}."
        )


def make_feed(config: RunConfig, splits: Splits, mesh: Mesh, *, first_step: int) -> Feed:
    """The feed that the config forces, or the fastest that the split fits: see `choose_feed`."""
    images, size, train = len(splits.train), splits.train.nbytes, config.train
    plan = BatchPlan(train.seed, images, train.batch_size)
    kind, reason = choose_feed(size, budget=device_memory_budget(), devices=mesh.size)
    if config.data.feed != "auto":
        kind, reason = config.data.feed, f"as config.data.feed says, though {kind} would be chosen ({reason})"
    say(f"feed: {kind}; {images:,} images: {reason}")
    rows = split_along(mesh, 1)
    if kind == "streamed":
        return StreamedFeed(
            splits.train,
            plan,
            capacity=train.steps_per_dispatch,
            first_step=first_step,
            batch_sharding=split_along(mesh, 0),
            rows_sharding=rows,
        )
    pixels = split_along(mesh, 0) if kind == "sharded" else replicated(mesh)
    return ResidentFeed(
        splits.train, plan, capacity=train.steps_per_dispatch, pixels_sharding=pixels, rows_sharding=rows
    )


def choose_feed(size: int, *, budget: int, devices: int) -> tuple[str, str]:
    """The fastest feed that a split of `size` bytes fits, and why, given the bytes that a device has for it."""
    given, slice_size = f"{size / 2**20:,.0f} MiB, {budget / 2**20:,.0f} MiB a device", -(-size // devices)
    if size <= budget:
        return "resident", f"{given}, into which all fit"
    if slice_size <= budget:
        return "sharded", f"{given}, into which a slice of {slice_size / 2**20:,.0f} MiB fits"
    return "streamed", f"{given}, which even a slice of {slice_size / 2**20:,.0f} MiB exceeds"


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
        *,
        schedule: Schedule,
        mesh: Mesh,
    ) -> None:
        """Takes what `train` has opened."""
        self.trainer, self.feed, self.schedule = trainer, feed, schedule
        self.checkpoints, self.telemetry, self.window = checkpoints, telemetry, Window()
        self.evaluation_split = splits.evaluation_split
        self.evaluator = Evaluator(trainer, splits.evaluation, mesh)
        self.painter = painter

    def run(self, state: TrainState, should_stop: Callable[[int], bool], *, started: float) -> TrainState:
        """Trains to the schedule's end, or until `should_stop`.

        The order is a contract. Advance; log, which needs the window's metrics; evaluate, which puts the latents'
        moments into the state; checkpoint, which saves them and the score. Whoever resumes from a checkpoint has
        therefore logged and evaluated all that it holds.
        """
        step, seconds_per_step = int(state.step), 0.0
        if step >= self.schedule.total:
            say(f"nothing is left to do: the run is at step {step:,} of {self.schedule.total:,}")
        compiled = self._compile(state, step) if step < self.schedule.total else None
        stopped = False
        while compiled is not None and step < self.schedule.total and not stopped:
            boundary = self.schedule.next_boundary(step)
            count = min(dispatch_length(seconds_per_step, self.feed.capacity), boundary - step)
            state, seconds = self._advance(compiled, state, step, count)
            if not seconds_per_step:
                say(f"first step after {time.time() - started:.1f} s")
            seconds_per_step = seconds / count
            step += count
            stopped = should_stop(step)
            evaluates = step % self.schedule.evaluate_every == 0 or step == self.schedule.total
            saves = evaluates or stopped or step % self.schedule.checkpoint_every == 0
            if saves or step % self.schedule.log_every == 0:
                self._log(step)
            loss = None
            if evaluates:
                state, loss = self._evaluate(state, step)
            if saves:
                self.checkpoints.save(state, step=step, loss=loss)
        return state

    def _compile(self, state: TrainState, step: int) -> jax.stages.Compiled:
        started = time.perf_counter()
        chunk = self.feed.abstract_chunk()
        compiled = compile_train_steps(self.trainer, state, chunk, capacity=self.feed.capacity)
        memory = compiled.memory_analysis()
        # Not XLA's own analysis, which counts the body of a loop once. The gradients cost twice the forward pass.
        flops = 3 * forward_flops(self.trainer.config.model, self.trainer.config.data.resolution)
        say(
            f"compiled in {time.perf_counter() - started:.1f} s: {flops / 1e6:,.1f} MFLOP per image, "
            f"{getattr(memory, 'temp_size_in_bytes', 0) / 2**20:,.0f} MiB of temporaries a device"
        )
        return compiled

    def _advance(
        self, compiled: jax.stages.Compiled, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, float]:
        started = time.perf_counter()
        chunk = self.feed.chunk(step, count)
        waited = time.perf_counter() - started
        state, metrics = compiled(state, chunk, np.int32(count))
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - started
        self.window.add(metrics, count, seconds)
        self.telemetry.advance(count, seconds=seconds, data_seconds=waited)
        return state, seconds

    def _log(self, step: int) -> None:
        values = self.window.fetch(self.trainer.config.train.batch_size)
        values["data_wait"], values["outside"] = self.telemetry.data_wait, self.telemetry.outside
        self.telemetry.write("train", step, values)
        say(
            f"step {step:>7,}/{self.schedule.total:,}  train       {describe(values)}  "
            f"data wait {values['data_wait']:.1%}  {self.telemetry.time_left} left"
        )

    def _evaluate(self, state: TrainState, step: int) -> tuple[TrainState, float]:
        started = time.perf_counter()
        loss, moments = jax.block_until_ready(self.evaluator(state))
        state = state.replace(latent_moments=moments)
        values = {name: float(value) for name, value in jax.device_get(loss)._asdict().items()}
        if self.trainer.config.data.dequantize:
            values["bits_per_dim"] = bits_per_dim(values["negative_elbo"], dimensions=self.trainer.dimensions)
        self.telemetry.write("evaluation", step, {"split": self.evaluation_split, **values})
        self.painter(state, step=step)
        values["seconds"] = time.perf_counter() - started
        self.telemetry.evaluated(values["seconds"])
        say(f"step {step:>7,}/{self.schedule.total:,}  {self.evaluation_split:<10}  {describe(values)}")
        return state, values["loss"]


def describe(values: dict[str, float]) -> str:
    """One line of the figures a reader wants."""
    line = f"loss {values['loss']:.2f}  mse {values['mse']:.5f}  kl {values['kl']:.2f} nats"
    if "bits_per_dim" in values:
        line += f"  {values['bits_per_dim']:.3f} bits/dim"
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

    Args:
      config: of the run.
      workdir: directory for checkpoints, pictures, metrics and `config.json`; created if missing.
      should_stop: asked with the number of finished steps after each dispatch; True saves and returns early.
      started: Unix time from which the first step is counted; the call's by default.

    Raises:
      UserError: anything that the user can mend, before any work is lost.
    """
    started = time.time() if started is None else started
    mesh = make_mesh()
    check_batch_size(config, mesh)
    directory = make_writable_directory(workdir, name="--workdir")
    for line in workdirs.claim(directory, config):
        say(line)
    splits = open_splits(config.data)
    check_split_size(config, len(splits.train), mesh)
    schedule = Schedule.of(config, images=len(splits.train))
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=schedule.total))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory))
        state = start_state(trainer, checkpoints, mesh)
        feed = make_feed(config, splits, mesh, first_step=int(state.step))
        stack.callback(feed.close)
        telemetry = stack.enter_context(
            Telemetry(
                directory,
                first_step=int(state.step),
                total_steps=schedule.total,
                batch_size=config.train.batch_size,
                tensorboard=config.train.tensorboard,
            )
        )
        painter = stack.enter_context(Painter(trainer, splits.evaluation, directory))
        loop = Loop(trainer, splits, feed, checkpoints, telemetry, painter, schedule=schedule, mesh=mesh)
        return loop.run(state, should_stop, started=started)


def start_state(trainer: Trainer, checkpoints: Checkpoints, mesh: Mesh) -> TrainState:
    """The newest checkpoint's state, or a fresh one."""
    devices = jax.devices()
    say(f"devices: {len(devices)} x {devices[0].device_kind}; convolutions: {trainer.model.execution.form}")
    latest = checkpoints.latest_step()
    if latest is None:
        state = create_state(trainer.config, trainer.model, trainer.optimizer, mesh)
        say(f"model: {parameter_count(state):,} parameters, counting batch statistics")
        return state
    say(f"resuming from step {latest:,}")
    return checkpoints.restore(abstract_state(trainer.config, trainer.model, trainer.optimizer, mesh), step=latest)
