"""Repeated timings: every case is warmed up, runs for about the same time, and takes its turn in every round.

The cases take turns (A B A B), so that a change of the machine's load affects all of them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from facevae_jax.config import RunConfig

ENOUGH = 0.25  # of the aimed-at time: a calibration this long is trusted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of `python -m benchmarks.throughput`."""

    config: RunConfig
    rounds: int = 3  # timings of each case
    seconds: float = 5.0  # of one timing, about
    images: int = 8192  # of the training split that `input` and `end_to_end` make


class Case(NamedTuple):
    """Something to time."""

    run: Callable[[int], float]  # runs it so many times and returns the seconds
    units: float  # of work (such as images) in one run


def repeated(call: Callable[[], Any], units: float) -> Case:
    """The case of a function that returns arrays; the last ones are awaited."""

    def run(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - started

    return Case(run, units)


def seconds_each(run: Callable[[int], float], *, seconds: float) -> float:
    """Seconds of one run after a warm-up, timed over at least `ENOUGH` of `seconds`."""
    run(1)
    count = 1
    while (taken := run(count)) < ENOUGH * seconds:
        count *= 4
    return taken / count


def rates(cases: Mapping[str, Case], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Units per second of every case in every round; one timing lasts about `seconds`."""
    counts = {name: max(1, round(seconds / seconds_each(case.run, seconds=seconds))) for name, case in cases.items()}
    values: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            case.run(1)  # faults in the memory that other cases have freed, as a single program does only once
            values[name].append(case.units * counts[name] / case.run(counts[name]))
    return values


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every case."""
    return {name: statistics.median(repeated) for name, repeated in values.items()}


def image_rates(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Two entries of a record: the medians and all values, in images/s."""
    return {"images_per_second": medians(values), "images_per_second_all": dict(values)}
