"""Interleaved measurements: what is compared runs in turn, so that a slow minute hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import process_time
from typing import NamedTuple

from safeopt.timing import clock


class Timings(NamedTuple):
    """Seconds of every run in every round, by the name of the run.

    Attributes:
        wall: by the clock on the wall.
        cpu: spent by this process's threads together: what remains where others use the machine.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> Timings:
    """Time runs against each other.

    Args:
        runs: what to time, by name; called in turn, in an order that is reversed every round.
        rounds: how often, at least 1.
        warm_up: rounds before that, which are not counted.
    """
    seconds = Timings({name: [] for name in runs}, {name: [] for name in runs})
    order = list(runs)
    for index in range(warm_up + rounds):
        for name in order:
            began, busy = clock(), process_time()
            runs[name]()
            taken = clock() - began, process_time() - busy
            if index >= warm_up:
                seconds.wall[name].append(taken[0])
                seconds.cpu[name].append(taken[1])
        order.reverse()
    return seconds


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over the rounds of the ratio within a round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


def milliseconds(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every run."""
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
