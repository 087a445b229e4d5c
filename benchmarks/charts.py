"""Where things stand in the page's own drawings (SVG): coordinates only, no colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Where values differ by more than this, a logarithmic scale tells the small ones apart.
SPREAD = 100


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels, with round ticks.

    Attributes:
        low: the value at ``start``.
        high: the value at ``end``.
        start: pixel of the lowest value.
        end: pixel of the highest.
        ticks: round values within, with their labels.
        log: whether the map is linear in the value's logarithm instead of the value.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, to a tenth."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def scale(
    values: Sequence[float], start: float, end: float, *, zero: bool = False, wide: bool = False
) -> Scale:
    """A scale that holds all values with a little room.

    Args:
        values: at least one; those that are not finite are left out.
        start: pixel of the lowest value.
        end: pixel of the highest.
        zero: begin at zero.
        wide: logarithmic where all values are above zero and the largest is more than `SPREAD`
            times the smallest; the ticks are powers of ten.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if wide and low > 0 and high > SPREAD * low:
        room = (high / low) ** 0.06
        low, high = low / room, high * room
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = tuple((10.0**i, f"{10.0**i:.{max(0, -i)}f}") for i in powers)
        return Scale(low, high, start, end, ticks, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (0.0 if zero and low >= 0 else low - room), high + room
    step = _round_step((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1))
    return Scale(low, high, start, end, ticks)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The ``d`` of an SVG path through pixels."""
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _round_step(step: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten that is not smaller."""
    power = 10 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
