"""Interleaved measurements: what is compared runs in turn, so that a slow minute hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every run in every round.

    Args:
        runs: what to time, by name; called in turn, in an order that is reversed every round.
        rounds: how often, at least 1.
        warm_up: rounds before that, which are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for index in range(warm_up + rounds):
        for name in order:
            began = perf_counter()
            runs[name]()
            taken = perf_counter() - began
            if index >= warm_up:
                seconds[name].append(taken)
        order.reverse()
    return seconds


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over the rounds of the ratio within a round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


def milliseconds(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every run."""
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
