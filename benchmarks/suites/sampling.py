"""Sampling: latents to pixels in the host's memory, as pictures are made."""

import time
from typing import Any

import jax
import numpy as np

from benchmarks.suites.options import Options
from benchmarks.suites.timing import Case, image_rates, rates
from benchmarks.suites.training import make_trainer
from facevae_jax.models.inference import Inference
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import create_state

BATCH_SIZES = (1, 64, 512)


def run(options: Options) -> dict[str, Any]:
    """Times decoding for each number of latents."""
    trainer = make_trainer(options.config)
    state = create_state(options.config, trainer.model, trainer.optimizer, make_mesh())
    variables = jax.block_until_ready(state.evaluation_variables)
    generator = np.random.default_rng(0)

    def case(batch_size: int) -> Case:
        latents = generator.standard_normal((batch_size, options.config.model.latent_dim), np.float32)
        inference = Inference(trainer.model, variables)

        def measure(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                inference.decode(latents)
            return time.perf_counter() - started

        return Case(measure, batch_size)

    cases = {str(size): case(size) for size in BATCH_SIZES}
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    return {"what": "latents to uint8 pixels in the host's memory, by batch size", **image_rates(values)}
