"""From a sweep's results to one row for each method: what the leaderboard shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.config import BASELINE, ConfigError, MethodConfig, RunConfig, SweepConfig
from benchmarks.frontier import Interval, Matched, Outcome, Samples, matched
from benchmarks.records import FILE, Record, RefusalNLL, Result, Span, read_result
from benchmarks.separation import interval
from benchmarks.sweep import CONFIG, LONG, TEST, VAL


@dataclass(frozen=True)
class Row:
    """One method of the leaderboard; means over seeds at its choice, on test.

    Attributes:
        method: its name.
        settings: of its choice, as the grid names them.
        ours: whether it is one of this package's.
        harmless: whether it also looks at harmless prompts.
        matched: at the baseline's task loss, and at its own.
        points: its published points, the choice first.
        grid: what its grid points reached on val.
        curves: of the choice: steps and alignment losses for each seed.
        separation: between harmful and harmless prompts, if the config asks for it.
        separation_interval: of it; None too where a record lacks the prompts' scores.
        passes: forward passes of the task, forward and backward passes for safety.
        long_rise: of the alignment loss in the long run; None without a whole one of the choice.
        long_task: task loss there.
    """

    method: str
    settings: str
    ours: bool
    harmless: bool
    matched: Matched
    points: tuple[Outcome, ...]
    grid: tuple[Outcome, ...]
    curves: tuple[tuple[tuple[int, float], ...], ...]
    task: float
    alignment: float
    refusal: float
    over_refusal: float
    harmless_kl: float | None
    task_metric: float | None
    separation: float | None
    separation_interval: Interval | None
    seconds: float
    share: float
    passes: tuple[float, float, float]
    peak_bytes: float
    long_rise: float | None
    long_task: float | None

    @property
    def removed(self) -> Interval | None:
        """Share of the baseline's rise that is removed at its task loss."""
        return self.matched.removed


@dataclass(frozen=True)
class Standings:
    """A sweep, ready to be shown.

    Attributes:
        rows: the method that removes most first; those that do not reach the task loss last, by
            what they remove at their own.
        test: the result on test.
        target: the task loss T* at which methods are compared.
        start_separation: the interval of the start's separation, as a row's.
        failures: runs that crashed and methods without a row, in words.
    """

    rows: tuple[Row, ...]
    test: Result
    config: RunConfig
    target: float
    tolerance: float
    start_separation: Interval | None
    failures: tuple[str, ...]

    @property
    def unequal(self) -> str:
        """Who was given harmless prompts, in a sentence; empty if nobody was."""
        given = [row.method.replace("_", " ") for row in self.rows if row.harmless]
        if not given:
            return ""
        return (
            f"Beside harmful prompts, {', '.join(given)} had harmless ones to keep answered (none "
            "of those measured); the over-refusals of the others are without."
        )


OURS = ("projected_adamw", "safety_sam", "preconditioned_sgd", "safeguard", "repair")


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep's results."""
    return (folder / CONFIG).exists() and (folder / TEST / FILE).exists()


def standings(folder: Path) -> Standings:
    """Read a sweep's folder.

    Args:
        folder: with the sweep's config and the stages' results.

    Raises:
        ConfigError: if runs are missing, or the prompts' losses are.
    """
    test = read_result(folder / TEST)
    if test is None or test.start is None or test.start.prompts is None:
        raise ConfigError(
            f"{folder / TEST / FILE}: no result of a sweep; make one "
            "with `python -m benchmarks sweep CONFIG --out DIR`"
        )
    config = test.run_config()
    swept = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tolerance = SweepConfig.model_validate(swept).tuning.tolerance
    groups = _complete(test, config)
    if BASELINE not in groups:
        raise ConfigError(f"{folder / TEST / FILE}: {BASELINE} has not finished with every seed")
    samples = {
        name: [_samples(records) for _, records in members] for name, members in groups.items()
    }
    compared = matched(samples, BASELINE, np.array(test.start.prompts), tolerance)
    others = [read_result(folder / stage) for stage in (VAL, LONG)]
    val, long = others
    grid = _by_family(val)
    longer = {} if long is None else _complete(long, long.run_config())
    rows = [
        _row(name, members, compared[name], grid.get(name, []), longer.get(name, []))
        for name, members in groups.items()
    ]
    rows.sort(key=_rank)
    failures = [
        f"{stage}: {failure.method}, seed {failure.seed}: {failure.error}"
        for stage, result in zip((TEST, VAL, LONG), [test, *others], strict=True)
        if result is not None
        for failure in result.failures
    ]
    failures += [
        f"{TEST}: {family}: what was chosen has not run with every seed"
        for family in dict.fromkeys(method.family for method in config.methods)
        if family not in groups
    ]
    base_task = float(samples[BASELINE][0].task.mean())
    return Standings(
        rows=tuple(rows),
        test=test,
        config=config,
        target=base_task * (1 + tolerance),
        tolerance=tolerance,
        start_separation=_separation_interval([test.start.refusal_nll]),
        failures=tuple(failures),
    )


def _rank(row: Row) -> tuple[bool, float, float]:
    """Those that reach the task loss first, by what they remove there; the others by their own."""
    own = row.matched.own.value if row.matched.own else float("-inf")
    return (row.removed is None, -(row.removed.value if row.removed else own), row.task)


def _complete(
    result: Result, config: RunConfig
) -> dict[str, list[tuple[MethodConfig, list[Record]]]]:
    """Records by family and point, the choice first.

    Points that lack a seed are left out, and with its choice a whole family: another point of it is
    not what was chosen.
    """
    groups: dict[str, list[tuple[MethodConfig, list[Record]]]] = {}
    for method in config.methods:
        # In the seeds' order, on which the pairing rests: an interrupted sweep has another one.
        found = [result.find(method.key, seed) for seed in config.seeds]
        records = [record for record in found if record is not None]
        groups.setdefault(method.family, []).append((method, records))
    seeds = len(config.seeds)
    return {
        family: [(method, records) for method, records in members if len(records) == seeds]
        for family, members in groups.items()
        if len(members[0][1]) == seeds
    }


def _by_family(result: Result | None) -> dict[str, list[Record]]:
    if result is None:
        return {}
    families = {method.key: method.family for method in result.run_config().methods}
    found: dict[str, list[Record]] = {}
    for record in result.records:
        found.setdefault(families[record.method], []).append(record)
    return found


def _samples(records: Sequence[Record]) -> Samples:
    ends = [record.curve[-1] for record in records]
    return Samples(
        task=np.array([end.task_loss for end in ends]),
        alignment=np.array([end.prompts for end in ends], dtype=np.float64),
    )


def _separation_interval(runs: Sequence[RefusalNLL | None]) -> Interval | None:
    """Of the runs of all seeds; None if one is of a version that did not keep the scores."""
    known = [scores for scores in runs if scores is not None]
    return interval(known) if len(known) == len(runs) else None


def _row(
    name: str,
    members: Sequence[tuple[MethodConfig, list[Record]]],
    compared: Matched,
    grid: Sequence[Record],
    longer: Sequence[tuple[MethodConfig, list[Record]]],
) -> Row:
    method, records = members[0]
    # The long runs may be left from an earlier choice.
    long = next((found for other, found in longer if other == method), [])

    def mean(of: Callable[[Record], float], over: Sequence[Record] = records) -> float:
        return sum(of(record) for record in over) / len(over)

    def measured(of: Callable[[Record], float | None]) -> float | None:
        """The mean of a figure that a config need not ask for."""
        return None if of(records[0]) is None else mean(lambda record: of(record) or 0.0)

    training = mean(lambda r: r.seconds.task + r.seconds.safety)
    return Row(
        method=name,
        settings=method.key.removeprefix(name)
        .removeprefix("[")
        .removesuffix("]")
        .replace(",", ", "),
        ours=method.name in OURS,
        harmless=method.given_harmless(),
        matched=compared,
        points=tuple(
            Outcome(
                mean(lambda r: r.task_loss.end, point), mean(lambda r: r.alignment_loss.end, point)
            )
            for _, point in members
        ),
        grid=tuple(Outcome(r.task_loss.end, r.alignment_loss.end) for r in grid),
        curves=tuple(
            tuple((point.step, point.alignment_loss) for point in record.curve)
            for record in records
        ),
        task=mean(lambda r: r.task_loss.end),
        alignment=mean(lambda r: r.alignment_loss.end),
        refusal=mean(lambda r: r.refusal_rate.end),
        over_refusal=mean(lambda r: r.over_refusal_rate.end),
        harmless_kl=measured(lambda r: r.harmless_kl),
        task_metric=measured(lambda r: _end(r.task_metric)),
        separation=measured(lambda r: _end(r.separation)),
        separation_interval=_separation_interval([record.refusal_nll for record in records]),
        seconds=training,
        share=mean(lambda r: r.seconds.safety) / training if training > 0 else 0.0,
        passes=(
            mean(lambda r: r.passes.task_forward),
            mean(lambda r: r.passes.safety_forward),
            mean(lambda r: r.passes.safety_backward),
        ),
        peak_bytes=max(record.peak_bytes for record in records),
        long_rise=mean(lambda r: r.alignment_loss.end - r.alignment_loss.start, long)
        if long
        else None,
        long_task=mean(lambda r: r.task_loss.end, long) if long else None,
    )


def _end(span: Span | None) -> float | None:
    """The figure after training, where the config asks for it."""
    return None if span is None else span.end
