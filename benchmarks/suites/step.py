"""The step alone: how fast the model trains when nothing else happens."""

from typing import Any

from benchmarks.suites import roofline
from benchmarks.suites.timing import Options

REPORTED = ("images_per_second", "images_per_second_all", "gflop_per_second", "share_of_roofline")


def run(options: Options) -> dict[str, Any]:
    """Times many steps per dispatch on one fixed batch in device memory, in turns with the roofline's cases."""
    train, record = options.config.train, roofline.run(options)
    return {
        "what": f"training steps on one fixed batch of {train.batch_size} in device memory, up to "
        f"{train.steps_per_dispatch} in one dispatch",
        "milliseconds_per_step": 1000 * train.batch_size / record["images_per_second"],
        **{name: record[name] for name in REPORTED},
    }
