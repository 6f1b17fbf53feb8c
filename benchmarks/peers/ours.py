"""Our side of the comparison: many steps in one dispatch, on a batch in device memory."""

import jax
from flax import __version__ as flax_version

from benchmarks.peers.case import Case, fixed_batch
from benchmarks.suites.training import FixedBatch
from facevae_jax.config import RunConfig
from facevae_jax.core import startup


def make_case(config: RunConfig, variant: str) -> Case:
    """The network of `config` as the training loop runs it; there are no variants."""
    startup.use_cores(config.train.batch_size // config.train.accumulation)  # as main does
    program = FixedBatch(config)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    versions = {"jax": jax.__version__, "flax": flax_version}
    return Case(program.start(fixed_batch(config)).run, program.parameters, device, versions)
