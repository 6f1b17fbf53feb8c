"""Fits the velocity of a flow by flow matching: many steps in one dispatch, sharded over the devices, resumable."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from facevae_jax.core import random
from facevae_jax.core.progress import progress_bar
from facevae_jax.latents.priors.base import Unfinished
from facevae_jax.latents.priors.velocity import Velocity

BATCH = 256  # codes
LEARNING_RATE, WARMUP, SECOND_DECAY = 5e-3, 100, 0.95
AVERAGING = 0.999  # of the averaged parameters, which are kept; less at the start
PASSES = 64  # over codes that are vectors, each with fresh draws from their posteriors
GRID_PASSES = 32  # over grids, whose network takes 20 times as long for a step
STEPS = (1_500, 8_000)  # at least and at most
DISPATCH = 50  # steps
HELD_OUT_EVERY, HELD_OUT = 200, 2_048  # steps, codes
UNLABELED = 0.5  # of the codes: the flow without labels learns from these; fewer, and it learns the labels by heart
SAVE_SECONDS = 30.0
SEED = 0

Rows = Int[Array, " b"]


class Codes(NamedTuple):
    """Posteriors with the labels of their images."""

    mean: Shaped[Any, "n z"]  # whitened
    deviation: Shaped[Any, "n z"]  # standard, before whitening
    labels: Shaped[Any, "n k"]  # of about unit size; NaN where unknown
    inverse: Shaped[Any, "z z"]  # of the whitening


class Fit(NamedTuple):
    """What the steps change."""

    params: Any
    averaged: Any
    moments: Any  # of Adam


class State(NamedTuple):
    """What is kept of an unfinished fit."""

    fit: Fit
    best: Any  # the averaged parameters with the lowest loss on held-out codes
    best_loss: Float[Any, ""]
    step: Int[Any, ""]


def steps_for(codes: int, *, grid: bool) -> int:
    """Steps of a fit to so many codes: `PASSES` or `GRID_PASSES` over them, within `STEPS`."""
    return int(np.clip((GRID_PASSES if grid else PASSES) * codes // BATCH, *STEPS))


def condition(labels: Float[Array, "n k"]) -> Float[Array, "n k2"]:
    """What a network reads of labels: each value, 0 where it is unknown, and whether it is known."""
    known = ~jnp.isnan(labels)
    return jnp.concatenate([jnp.where(known, labels, 0.0), known.astype(labels.dtype)], axis=1)


@dataclasses.dataclass(frozen=True)
class Matching:
    """The functions of a fit of `steps` steps."""

    network: Velocity
    steps: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a cosine schedule."""
        rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, self.steps // 2), self.steps)
        return optax.adam(rate, b2=SECOND_DECAY)

    def initial(self, codes: Codes) -> State:
        """Before the first step."""
        code, labels = (jnp.zeros((1, part.shape[1])) for part in (codes.mean, codes.labels))
        params = self.network.init(random.named_key(SEED, "flow"), code, jnp.zeros(1), condition(labels))["params"]
        copies = [jax.tree.map(jnp.copy, params) for _ in range(2)]
        fit = Fit(params, copies[0], self.optimizer.init(params))
        return State(fit, copies[1], jnp.float32(jnp.inf), jnp.int32(0))

    def loss(self, params: Any, codes: Codes, rows: Rows, key: PRNGKeyArray, *, held_out: bool) -> Float[Array, ""]:
        """(velocity(y, a) - dy/da)² on the path y = cos(a) noise + sin(a) code, a from 0 to pi/2; mean over numbers.

        Flow matching (Lipman et al. 2023, equation 23) on the trigonometric path (Albergo & Vanden-Eijnden 2023,
        section 4). Noise and whitened codes have the same covariance, and so has y: where the codes are Gaussian, the
        best velocity is 0, where training starts.

        Args:
          params: of the network.
          codes: to draw from.
          rows: of a batch; what is drawn for each is a function of the row and the key.
          key: of the step.
          held_out: row i takes code i with its labels; else a random one, with its labels or without.
        """
        size, width = codes.mean.shape
        which, posterior, noises, hide = (random.substream(random.keys_of(key, rows), number) for number in range(4))
        chosen = rows if held_out else jax.vmap(lambda k: jax.random.randint(k, (), 0, size))(which)
        mean, deviation, labels = (part[chosen] for part in (codes.mean, codes.deviation, codes.labels))
        x = mean + (deviation * random.normal(posterior, (width,))) @ codes.inverse.T
        noise = random.normal(noises, (width,))
        if not held_out:
            hidden = jax.vmap(lambda k: jax.random.bernoulli(k, UNLABELED))(hide)
            labels = jnp.where(hidden[:, None], jnp.nan, labels)
        # One angle in each of as many equal parts of the path as there are rows.
        place = jax.random.uniform(jax.random.fold_in(key, BATCH))
        angle = 0.5 * math.pi * (rows + place) / (size if held_out else BATCH)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        velocity: Any = self.network.apply({"params": params}, cos * noise + sin * x, angle, condition(labels))
        return jnp.mean(jnp.square(velocity - (cos * x - sin * noise)))

    def advance(self, fit: Fit, codes: Codes, rows: Rows, first: Int[Array, ""]) -> Fit:
        """`DISPATCH` steps from step `first`, or fewer at the end."""
        key, optimizer = random.named_key(SEED, "flow steps"), self.optimizer

        def one(step: Array, fit: Fit) -> Fit:
            gradients = jax.grad(self.loss)(fit.params, codes, rows, jax.random.fold_in(key, step), held_out=False)
            updates, moments = optimizer.update(gradients, fit.moments, fit.params)
            params: Any = optax.apply_updates(fit.params, updates)
            decay = jnp.minimum(AVERAGING, (1.0 + step) / (10.0 + step))
            return Fit(params, optax.incremental_update(params, fit.averaged, 1.0 - decay), moments)

        return lax.fori_loop(first, jnp.minimum(first + DISPATCH, self.steps), one, fit)

    def select_best(self, state: State, held_out: Codes) -> State:
        """With the averaged parameters as the best, if their loss on held-out codes is lower.

        The draws are the same each time.
        """
        size, key = len(held_out.mean), random.named_key(SEED, "flow held out")
        parts, averaged = jnp.arange(size).reshape(-1, min(BATCH, size)), state.fit.averaged
        loss = jnp.mean(lax.map(lambda rows: self.loss(averaged, held_out, rows, key, held_out=True), parts))
        lower = loss < state.best_loss
        best = jax.tree.map(lambda new, old: jnp.where(lower, new, old), averaged, state.best)
        return state._replace(best=best, best_loss=jnp.minimum(loss, state.best_loss))


def fit(
    network: Velocity,
    codes: Codes,
    held_out: Codes,
    *,
    mesh: Mesh,
    unfinished: Unfinished,
    seconds: float = math.inf,
) -> Any:
    """The network's averaged parameters with the lowest loss on held-out codes.

    That of the start is kept too, which is the Gaussian: a flow that only learns its few codes by heart never wins.

    Args:
      network: of the velocity.
      codes: to fit.
      held_out: to choose by.
      mesh: of the devices, each of which computes its part of a batch of grids; steps of vectors are too short to
        share, and the first device computes them.
      unfinished: where the state is kept meanwhile; an earlier fit continues from there.
      seconds: that the fit may take.

    Returns:
      The parameters; None where they would take longer, and the fit was left unfinished.
    """
    grid = len(network.code_shape) > 1
    devices = mesh.devices.flat[: math.gcd(BATCH, mesh.size) if grid else 1].tolist()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    matching = Matching(network, steps_for(len(codes.mean), grid=grid))
    initial, advance, select_best = _compiled(matching, whole)
    codes, held_out = jax.device_put((codes, _whole_batches(held_out)), whole)
    rows = jax.device_put(np.arange(BATCH, dtype=np.int32), cut)
    state = _resumed(select_best(initial(codes), held_out), unfinished.load())
    pace, saved = Pace(int(state.step), seconds), time.perf_counter()
    with progress_bar(total=matching.steps, description="fitting the flow", unit="step") as bar:
        bar.update(pace.first)
        for step in range(pace.first, matching.steps, DISPATCH):
            done = min(step + DISPATCH, matching.steps)
            state = State(advance(state.fit, codes, rows, step), *state[1:3], jax.device_put(np.int32(done), whole))
            if done % HELD_OUT_EVERY == 0 or done == matching.steps:
                state = select_best(state, held_out)
            jax.block_until_ready(state)
            bar.update(done - step)
            late = pace.is_late(done, matching.steps)
            if late or time.perf_counter() - saved > SAVE_SECONDS:
                unfinished.save({str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))})
                saved = time.perf_counter()
            if late:
                return None
    return jax.tree.map(jnp.asarray, jax.device_get(state.best))  # for any devices


@functools.lru_cache(maxsize=8)
def _compiled(matching: Matching, whole: NamedSharding) -> tuple[Callable[..., Any], ...]:
    """The functions of a fit, jitted."""
    return (
        jax.jit(matching.initial, out_shardings=whole),
        jax.jit(matching.advance, out_shardings=whole, donate_argnums=0),
        jax.jit(matching.select_best, out_shardings=whole),
    )


class Pace:
    """Whether a fit will take longer than it may."""

    def __init__(self, first: int, seconds: float) -> None:
        """From now, at step `first`."""
        self.first, self._seconds = first, seconds
        self._began = time.perf_counter()
        self._warm: tuple[int, float] | None = None  # after the first dispatch, which compiles

    def is_late(self, step: int, steps: int) -> bool:
        """After a dispatch that ended at `step`."""
        now = time.perf_counter()
        if self._warm is None:
            self._warm = step, now
            return now - self._began > self._seconds
        at, since = self._warm
        return now - self._began + (now - since) / (step - at) * (steps - step) > self._seconds


def _whole_batches(codes: Codes) -> Codes:
    """The first ones, as many as `HELD_OUT` and whole batches allow."""
    size = len(codes.mean)
    size = min(size - size % BATCH if size > BATCH else size, HELD_OUT)
    return codes._replace(mean=codes.mean[:size], deviation=codes.deviation[:size], labels=codes.labels[:size])


def _resumed(state: State, kept: dict[str, np.ndarray] | None) -> State:
    """The kept state, where there is one of the same shapes; else the given one."""
    leaves, structure = jax.tree.flatten(state)
    given = [(kept or {}).get(str(number)) for number in range(len(leaves))]
    if not all(new is not None and new.shape == old.shape for new, old in zip(given, leaves, strict=True)):
        return state
    pairs = zip(given, leaves, strict=True)
    return jax.tree.unflatten(structure, [jax.device_put(new, old.sharding) for new, old in pairs])
