"""The step alone: how fast the model trains when nothing else happens."""

from typing import Any

import jax

from benchmarks.suites.timing import Options, medians, rates
from benchmarks.suites.training import FixedBatch


def run(options: Options) -> dict[str, Any]:
    """Times many steps per dispatch on one fixed batch in device memory."""
    train = options.config.train
    program = FixedBatch(options.config)
    values = rates({"step": program.start()}, rounds=options.rounds, seconds=options.seconds)
    memory = jax.local_devices()[0].memory_stats() or {}
    speed = medians(values)["step"]
    return {
        "what": f"training steps on one fixed batch of {train.batch_size} in device memory, up to "
        f"{train.steps_per_dispatch} in one dispatch",
        "images_per_second": speed,
        "images_per_second_all": values["step"],
        "milliseconds_per_step": 1000 * train.batch_size / speed,
        "temporary_bytes": program.temporary_bytes,
        "peak_bytes_in_use": memory.get("peak_bytes_in_use"),  # of the device, where it tells
    }
