"""What every suite is given, and how a suite says that it cannot run here."""

import dataclasses
import pathlib

from facevae_jax.config import RunConfig


class Skipped(Exception):
    """The suite cannot run on this machine; the message is one line that says what is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of one call of `python -m benchmarks.throughput`."""

    config: RunConfig
    rounds: int = 3  # timings of each case
    seconds: float = 5.0  # one timing, about
    images: int = 8192  # of the training split that `input` and `end_to_end` make
    source: pathlib.Path | None = None  # folder of images for `prepare`; None: files that it writes itself
    layout: str = "folder"  # of `source`, as in facevae_jax.prepare
