"""A tuned comparison: every grid point on ``val``, the choice on ``test``, long runs of it.

Each stage is a plain result in a folder of its own (``val``, ``test``, ``long``), made by
`benchmarks.run` and continued where it was left. Nothing that is measured on ``test`` reaches a
choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.config import (
    BASELINE,
    ConfigError,
    MethodConfig,
    RunConfig,
    SweepConfig,
    TuningConfig,
)
from benchmarks.frontier import Outcome, nondominated
from benchmarks.jobs import Executor
from benchmarks.records import Record, Result
from benchmarks.run import continued, run
from safeopt.files import write_json

VAL, TEST, LONG = "val", "test", "long"
CONFIG = "sweep.json"


def sweep(
    config: SweepConfig,
    out: Path,
    console: Console,
    executor: Executor | None = None,
    threads: int | None = None,
) -> int:
    """Run what is not there yet.

    Args:
        config: what to run.
        out: folder of the stages.
        console: where the progress is shown.
        executor: where the runs take place; None for this process.
        threads: processor threads of a run where the config does not say.

    Returns:
        The number of runs that failed.

    Raises:
        ConfigError: if ``out`` holds a sweep that differs in more than its methods, or all runs of
            a method on val have failed.
    """
    points = tuple(point for method in config.methods for point in method.points())
    stages = _stages(config)
    # Before anything is written: the leaderboard of what is there reads its sweep's own config.
    for name, stage in stages.items():  # what is chosen of the points is not known yet
        continued(stage(points), out / name, methods_may_change=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, config.as_json())
    console.rule(f"val: {len(points)} grid points")
    # Methods may be added, and the retry of a failed run may change a choice.
    go_on = partial(
        run, console=console, executor=executor, threads=threads, methods_may_change=True
    )
    tuned = go_on(stages[VAL](points), out / VAL)
    chosen = choose(points, tuned, config.tuning)
    console.rule(f"test: {sum(map(len, chosen.values()))} choices, {len(config.seeds)} seeds")
    published = tuple(point for group in chosen.values() for point in group)
    results = [tuned, go_on(stages[TEST](published), out / TEST)]
    if config.long is not None:
        best = tuple(group[0] for group in chosen.values())
        console.rule(f"long: {len(best)} choices, {config.long} times the steps")
        results.append(go_on(stages[LONG](best), out / LONG))
    return sum(len(result.failures) for result in results)


def _stages(config: SweepConfig) -> dict[str, Callable[[tuple[MethodConfig, ...]], RunConfig]]:
    """The stages by their folders, each made from its methods."""
    stage = config.stage
    stages = {
        VAL: lambda methods: stage("val", methods, config.tuning.seeds),
        TEST: lambda methods: stage("test", methods, config.seeds),
    }
    if (times := config.long) is not None:
        stages[LONG] = lambda methods: stage("test", methods, config.seeds, times)
    return stages


def choose(
    points: Sequence[MethodConfig], tuned: Result, tuning: TuningConfig
) -> Mapping[str, tuple[MethodConfig, ...]]:
    """The grid points to publish, by method: the choice first, then its frontier neighbours.

    The baseline's choice has the lowest task loss; its whole frontier is published, since methods
    that end elsewhere are compared with it. Every other method's has the lowest alignment
    loss among the points whose task loss is at most ``tolerance`` above that; if there is none, the
    lowest task loss.

    Args:
        points: all grid points.
        tuned: their runs on ``val``.
        tuning: the tolerance, and how many points to publish.

    Raises:
        ConfigError: if all runs of a method have failed.
    """
    groups: dict[str, list[tuple[MethodConfig, Outcome]]] = {}
    for point in points:
        records = [record for record in tuned.records if record.method == point.key]
        groups.setdefault(point.family, [])
        if len(records) == len(tuning.seeds):
            groups[point.family].append((point, _mean(records)))
    if empty := [name for name, members in groups.items() if not members]:
        raise ConfigError(
            f"{', '.join(empty)}: no grid point has finished on val; see the failures in "
            f"{VAL}/result.json, then run the same command again"
        )
    limit = min(outcome.task for _, outcome in groups[BASELINE]) * (1 + tuning.tolerance)
    return {
        name: _published(members, name == BASELINE, limit, tuning.points)
        for name, members in groups.items()
    }


def _published(
    members: Sequence[tuple[MethodConfig, Outcome]], baseline: bool, limit: float, number: int
) -> tuple[MethodConfig, ...]:
    eligible = [] if baseline else [member for member in members if member[1].task <= limit]
    if eligible:
        best = min(eligible, key=lambda member: (member[1].alignment, member[1].task))
    else:
        best = min(members, key=lambda member: (member[1].task, member[1].alignment))
    front = nondominated([outcome for _, outcome in members])
    others = sorted(
        (member for member in members if member is not best and member[1] in front),
        key=lambda member: abs(member[1].task - best[1].task),
    )
    return tuple(point for point, _ in [best, *others][: None if baseline else number])


def _mean(records: Sequence[Record]) -> Outcome:
    return Outcome(
        task=sum(record.task_loss.end for record in records) / len(records),
        alignment=sum(record.alignment_loss.end for record in records) / len(records),
    )
