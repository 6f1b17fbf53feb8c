"""Training speed of the paper's model with each form of its convolutions, one step a dispatch and many.

python -m benchmarks.convolution_forms --output=benchmarks/results/convolution_forms_cpu.json

The cases take turns, so that a change in the machine's load meets all of them.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.environment import environment
from configs import gdl128
from facevae_jax.config import RunConfig
from facevae_jax.data import synthetic
from facevae_jax.data.batches import Chunk
from facevae_jax.files import write_json
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import create_state, make_model, make_optimizer
from facevae_jax.training.step import Trainer, train_step, train_steps

_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timings of each case.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "One timing, about.")
CAPACITY = 64  # steps in one dispatch, at most


def make_case(config: RunConfig, form: Any, pixels: jax.Array, *, many: bool) -> Callable[[int], float]:
    """A function that trains for `steps` steps and returns the seconds they took."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, convolution=form))
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=1000))
    state = create_state(config, trainer.model, trainer.optimizer, make_mesh())
    rows = jnp.broadcast_to(jnp.arange(config.train.batch_size), (CAPACITY, config.train.batch_size))
    one = jax.jit(functools.partial(train_step, trainer=trainer), donate_argnums=0)
    loop = jax.jit(functools.partial(train_steps, trainer=trainer, capacity=CAPACITY), donate_argnums=0)

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        if many:
            state, _ = loop(state, Chunk(pixels, rows), np.int32(steps))
        else:
            for _ in range(steps):
                state, _ = one(state, pixels)
        jax.block_until_ready(state)
        return time.perf_counter() - started

    return run


def main(arguments: list[str]) -> None:
    """Times every case, writes and prints the record."""
    del arguments
    config = RunConfig.from_config_dict(gdl128.get_config())
    batch = config.train.batch_size
    pixels = jnp.asarray(synthetic.faces(np.arange(batch), resolution=config.data.resolution))
    cases, steps = {}, {}
    for many in (False, True):
        for form in ("plain", "matmul"):
            name = f"{form}, {'many steps' if many else 'one step'} a dispatch"
            cases[name] = make_case(config, form, pixels, many=many)
            cases[name](1)  # compiles
            steps[name] = int(np.clip(_SECONDS.value / cases[name](1), 1, CAPACITY))
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(_ROUNDS.value):
        for name, run in cases.items():
            rates[name].append(steps[name] * batch / run(steps[name]))
    record = {
        "what": f"training steps of gdl128 in float32, batch {batch}, on one fixed batch; images per second",
        "median": {name: statistics.median(values) for name, values in rates.items()},
        "all": rates,
        **environment(),
    }
    write_json(pathlib.Path(_OUTPUT.value), record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    app.run(main)
