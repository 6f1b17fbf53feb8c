"""Sampling: codes to pixels in the host's memory, as pictures are made."""

from typing import Any

import jax
import numpy as np

from benchmarks.suites.timing import Options, image_rates, rates, repeated
from facevae_jax.inference import Inference
from facevae_jax.training.setup import TrainSetup, create_state, make_mesh

BATCH_SIZES = (1, 64, 512)


def run(options: Options) -> dict[str, Any]:
    """Times decoding for each number of codes."""
    setup = TrainSetup.of(options.config, make_mesh(jax.devices()[:1]))  # as commands do that sample
    inference = Inference(setup.model, jax.block_until_ready(create_state(setup).evaluation_variables))
    codes = np.random.default_rng(0).standard_normal((max(BATCH_SIZES), inference.code_size), np.float32)
    cases = {str(size): repeated(lambda size=size: inference.decode(codes[:size]), size) for size in BATCH_SIZES}
    values = rates(cases, rounds=options.rounds, seconds=options.seconds)
    return {"what": "codes to uint8 pixels in the host's memory, by batch size", **image_rates(values)}
