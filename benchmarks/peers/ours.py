"""Our side of the comparison: `compile_train_steps`, many steps in one dispatch, on a batch in device memory."""

import time

import jax
import numpy as np
from flax import __version__ as flax_version

from benchmarks.peers.case import Case, Timing, fixed_batch
from facevae_jax.config import RunConfig
from facevae_jax.data.batches import Chunk
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import create_state, make_model, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps


def make_case(config: RunConfig, variant: str) -> Case:
    """The network of `config` as the training loop runs it; there are no variants."""
    del variant
    batch_size, capacity = config.train.batch_size, config.train.steps_per_dispatch
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=1000))
    mesh = make_mesh()
    state = create_state(config, trainer.model, trainer.optimizer, mesh)
    rows = np.tile(np.arange(batch_size, dtype=np.int32), (capacity, 1))
    chunk = Chunk(jax.device_put(fixed_batch(config), replicated(mesh)), jax.device_put(rows, split_along(mesh, 1)))
    compiled = compile_train_steps(trainer, state, chunk, capacity=capacity)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def train(steps: int) -> Timing:
        nonlocal state
        started = time.perf_counter()
        for first in range(0, steps, capacity):
            count = min(capacity, steps - first)
            state, metrics = compiled(state, chunk, np.int32(count))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        if not np.isfinite(loss := metrics.loss.loss[count - 1]):
            raise FloatingPointError(f"the loss became {loss}")
        return Timing(steps * batch_size, seconds)

    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    return Case(train, parameters, device, {"jax": jax.__version__, "flax": flax_version})
