"""Alignment loss against task loss: frontiers, figures at matched task loss, their intervals.

A method's frontier is what its points (settings) can reach. At a task loss T it has the alignment
loss

    A(T) = linear interpolation between the neighbouring points that no other one dominates;
           the lowest alignment loss of all where every point has a lower task loss than T;
           nothing where none has: the method does not reach T.

Methods are compared at the task loss T* that the baseline's choice ends with (plus a tolerance):

    share removed = 1 − (A_method(T*) − A_start) / (A_baseline − A_start)

A method that does not reach T* can still be compared where it ends: its choice has task loss T and
alignment loss A, and the baseline's frontier, which smaller learning rates make, has A_baseline(T):

    share removed at its own task loss = 1 − (A − A_start) / (A_baseline(T) − A_start)

with the baseline's choice in place of A_baseline(T) where the method's task loss is even lower.

Intervals are paired bootstrap percentiles (Efron and Tibshirani 1993): seeds and prompts are drawn
with replacement, the same for every method and for the start, so that what all methods have in
common cancels. Three to five seeds make coarse intervals; the prompts are the larger part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
LEVEL = 0.95


class Outcome(NamedTuple):
    """A model by its two losses, in nats per token."""

    task: float
    alignment: float


def nondominated(points: Sequence[Outcome]) -> list[Outcome]:
    """The points that no other one beats in one loss without losing in the other, by task loss."""
    front: list[Outcome] = []
    for point in sorted(set(points)):
        if not front or point.alignment < front[-1].alignment:
            front.append(point)
    return front


def at_task_loss(points: Sequence[Outcome], task: float) -> float | None:
    """A(T): the alignment loss of a frontier at a task loss, None if it is not reached."""
    front = nondominated(points)
    if not front or task < front[0].task:
        return None
    for left, right in pairwise(front):
        if task <= right.task:
            share = (task - left.task) / (right.task - left.task)
            return left.alignment + share * (right.alignment - left.alignment)
    return front[-1].alignment


@dataclass(frozen=True)
class Samples:
    """One point of a method: its runs.

    Attributes:
        task: task loss of each seed, shape ``(s,)``.
        alignment: alignment loss of each seed and prompt, shape ``(s, q)``.
    """

    task: NDArray[np.float64]
    alignment: NDArray[np.float64]

    def outcome(self, seeds: NDArray[np.int64], prompts: NDArray[np.int64]) -> Outcome:
        """The mean over the given seeds and prompts, repetitions included."""
        chosen = self.alignment[np.ix_(seeds, prompts)]
        return Outcome(float(self.task[seeds].mean()), float(chosen.mean()))


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap percentiles."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Matched:
    """A method at the baseline's task loss.

    Attributes:
        alignment: A(T*); None where the method does not reach T*.
        removed: share of the baseline's rise that is removed at T*; None also where the baseline
            did not rise.
        own: the same at the task loss of the method's own choice.
        reached: share of the replicates in which the method reaches T*.
    """

    alignment: Interval | None
    removed: Interval | None
    own: Interval | None
    reached: float


def matched(
    methods: Mapping[str, Sequence[Samples]],
    baseline: str,
    start: NDArray[np.float64],
    tolerance: float = 0.01,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Matched]:
    """Every method at the baseline's task loss, with paired bootstrap intervals.

    Args:
        methods: the points of each method, its choice first. All have the same seeds and prompts.
        baseline: whose first point sets T*.
        start: alignment loss of each prompt before training, shape ``(q,)``.
        tolerance: share of the baseline's task loss that is added to it for T*.
        replicates: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: if methods differ in their number of seeds or prompts.
    """
    shapes: set[tuple[int, ...]] = {
        samples.alignment.shape for points in methods.values() for samples in points
    }
    if len(shapes) != 1 or next(iter(shapes))[1] != len(start):
        raise ValueError(
            f"methods: seeds and prompts are paired, but the shapes are {sorted(shapes)} and "
            f"{len(start)} prompts at the start"
        )
    seeds, prompts = next(iter(shapes))
    estimate = _at(methods, baseline, start, tolerance, np.arange(seeds), np.arange(prompts))
    rng = np.random.default_rng(seed)
    drawn = [
        _at(
            methods,
            baseline,
            start,
            tolerance,
            rng.integers(0, seeds, seeds),
            rng.integers(0, prompts, prompts),
        )
        for _ in range(replicates)
    ]
    return {
        name: _summary(found, [replicate[name] for replicate in drawn])
        for name, found in estimate.items()
    }


class _Figures(NamedTuple):
    """What `Matched` holds, for one draw of seeds and prompts."""

    alignment: float | None
    removed: float | None
    own: float | None


def _at(
    methods: Mapping[str, Sequence[Samples]],
    baseline: str,
    start: NDArray[np.float64],
    tolerance: float,
    seeds: NDArray[np.int64],
    prompts: NDArray[np.int64],
) -> dict[str, _Figures]:
    """The figures of every method, for one draw of seeds and prompts."""
    outcomes = {
        name: [samples.outcome(seeds, prompts) for samples in points]
        for name, points in methods.items()
    }
    base = outcomes[baseline][0]
    before = float(start[prompts].mean())

    def share(value: float | None, reference: float) -> float | None:
        if value is None or reference <= before:
            return None
        return 1 - (value - before) / (reference - before)

    found = {}
    for name, points in outcomes.items():
        # The baseline is its choice, not its frontier: that is what others are measured against.
        at_target = (
            base.alignment
            if name == baseline
            else at_task_loss(points, base.task * (1 + tolerance))
        )
        there = at_task_loss(outcomes[baseline], points[0].task)
        found[name] = _Figures(
            alignment=at_target,
            removed=share(at_target, base.alignment),
            own=share(points[0].alignment, base.alignment if there is None else there),
        )
    return found


def _summary(found: _Figures, drawn: Sequence[_Figures]) -> Matched:
    alignment, removed, own = (
        None
        if value is None
        else percentiles(value, [other for other in others if other is not None])
        for value, others in zip(found, zip(*drawn, strict=True), strict=True)
    )
    reached = sum(figures.alignment is not None for figures in drawn) / max(1, len(drawn))
    return Matched(alignment, removed, own, reached)


def percentiles(value: float, drawn: Sequence[float]) -> Interval:
    """An estimate with the percentiles of what replicates gave; without any it has no width."""
    if not drawn:
        return Interval(value, value, value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
