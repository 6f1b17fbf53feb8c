"""Work for several threads whose results come in order."""

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 3  # items per thread: one that is worked on, one that waits, one whose result waits for its turn


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Generator[Result, None, None]:
    """`function` of every item, by `threads` threads, in the order of `items`, which are taken a few at a time.

    An exception of `function` is raised where its result would be; work that has not begun is then dropped, as it is
    when the caller closes the generator.
    """
    in_flight: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as executor, contextlib.ExitStack() as stack:
        stack.callback(lambda: [future.cancel() for future in in_flight])
        for item in items:
            in_flight.append(executor.submit(function, item))
            if len(in_flight) >= threads * IN_FLIGHT:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()


def available_cpus() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
