"""Repeated timings: every case is warmed up, runs for about the same time, and takes its turn in every round.

Turns (A B A B), because the load of a machine changes: a change then meets all cases.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ENOUGH = 0.25  # of the time aimed at: a calibration this long is trusted


class Case(NamedTuple):
    """Something to time."""

    run: Callable[[int], float]  # does it so many times and returns the seconds that took
    units: float  # of work (images, say) in doing it once


def seconds_each(run: Callable[[int], float], *, seconds: float) -> float:
    """Seconds of doing it once, after a warm-up; timed over at least `ENOUGH` of `seconds`."""
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
            case.run(1)  # memory that other cases gave back is faulted in again: a run of one program does that once
            values[name].append(case.units * counts[name] / case.run(counts[name]))
    return values


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every case."""
    return {name: statistics.median(repeated) for name, repeated in values.items()}


def image_rates(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Two entries of a record: the medians and all values, in images/s."""
    return {"images_per_second": medians(values), "images_per_second_all": dict(values)}


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
