"""From a config to a result: every method with every seed, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.bench import Bench, DivergedError
from benchmarks.config import TINY, ConfigError, RunConfig
from benchmarks.data.datasets import labelled_refusals
from benchmarks.environment import environment, sources
from benchmarks.jobs import Executor, Job, JobListener, told
from benchmarks.judge import judge_quality
from benchmarks.records import (
    Failure,
    Judge,
    Point,
    Record,
    Result,
    Start,
    read_result,
    write_result,
)

# What makes two environments different: edits that are not committed show in the sources alone.
ORIGIN = ("commit", "sources", "packages", "python", "processor", "threads", "device")
LOCK = ".lock"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a folder: of two processes that write one result each would undo the other's runs.

    Raises:
        ConfigError: if another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{out}: another process is working on this result; wait for it or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (out / LOCK).unlink(missing_ok=True)


def run(
    config: RunConfig,
    out: Path,
    console: Console,
    executor: Executor | None = None,
    threads: int | None = None,
    *,
    methods_may_change: bool = False,
) -> Result:
    """Do the runs that are not yet in ``out/result.json``, and add each when it is finished.

    Args:
        config: what to run.
        out: the folder of the result.
        console: where the progress is shown.
        executor: where the runs take place, see `benchmarks.jobs`. With None they take place in
            this process, and a crash ends the whole; elsewhere it ends that run only and is
            recorded in the result's ``failures``, as a run that diverges is everywhere.
        threads: processor threads of a run where the config does not say.
        methods_may_change: continue a result whose config has other methods; the records of those
            that are still there, with the same settings, are kept.

    Raises:
        ConfigError: if ``out`` holds the result of another config.
    """
    known = continued(config, out, methods_may_change=methods_may_change)
    if known is None:
        result = Result(environment=_origin(config, threads), config=config.as_json())
    else:
        result = known
    pending = [
        (method.key, seed)
        for seed in config.seeds
        for method in config.methods
        if result.find(method.key, seed) is None
    ]
    if not pending:
        console.print(f"{out}: all {len(result.records)} runs are there already")
        if methods_may_change:  # there may be fewer of them, or in another order
            result.failures = []
            _in_order(result, config)
            write_result(result, out)
        return result
    if result.records:
        console.print(f"{out}: {len(result.records)} runs are there, {len(pending)} to go")
    if known is not None:  # also without a record: its start was measured before
        _note_change(result, _origin(config, threads), console)
    if result.judge is None and config.model.name != TINY and not config.model.dry:
        result.judge = Judge.model_validate(judge_quality(labelled_refusals()))
    bench = None
    if executor is None:
        with console.status(f"loading {config.model.name} and {config.task.name}"):
            bench = Bench(config)
    if result.start is None:
        with console.status("measuring the starting point"):
            if executor is None:
                assert bench is not None
                result.start = bench.measure_start()
            else:
                result.start = Start.model_validate(executor.start(config.as_json(), threads))
        _say_start(console, result.start)
    result.failures = []
    write_result(result, out)
    start = result.start.model_dump(mode="json")
    jobs = [Job(config.as_json(), key, seed, start, threads) for key, seed in pending]
    with _progress(console, len(jobs)) as progress:
        listener = _Recorder(result, out, console, progress, config.steps)
        if executor is None:
            assert bench is not None
            _here(bench, jobs, result.start, listener)
        else:
            executor.run(jobs, listener)
    _in_order(result, config)
    write_result(result, out)
    return result


def continued(config: RunConfig, out: Path, *, methods_may_change: bool) -> Result | None:
    """What `run` goes on with; None where it begins. Nothing is written.

    Args:
        config: as for `run`.
        out: as for `run`.
        methods_may_change: as for `run`.

    Raises:
        ConfigError: if ``out`` holds the result of another config.
    """
    result = read_result(out)
    if result is not None and result.config != config.as_json():
        # One of an earlier version lacks the entries that have come since, with their defaults.
        result.config = result.run_config().as_json()
    if result is not None and methods_may_change:
        _keep_methods(result, config)
    if result is not None and result.config != config.as_json():
        raise ConfigError(
            f"{out}: holds the result of another config; choose another --out, or remove the folder"
        )
    return result


def _keep_methods(result: Result, config: RunConfig) -> None:
    """Give a result the methods of another config, which is else the same."""
    wanted = config.as_json()
    if {**result.config, "methods": None} != {**wanted, "methods": None}:
        return
    same = [entry for entry in result.config["methods"] if entry in wanted["methods"]]
    keys = {entry["label"] or entry["name"] for entry in same}
    result.records = [record for record in result.records if record.method in keys]
    result.config = wanted


def _origin(config: RunConfig, threads: int | None) -> dict[str, Any]:
    """What the runs of this process are made by."""
    return {
        **environment(config.threads or threads),
        "sources": sources(method.source() for method in config.methods),
    }


def _note_change(result: Result, here: dict[str, Any], console: Console) -> None:
    """Keep the environment of a continuation that is not one of those there were before."""

    def origin(known: dict[str, Any]) -> list[Any]:
        return [known.get(name) for name in ORIGIN]

    if origin(here) not in map(origin, [result.environment, *result.continued]):
        result.continued.append(here)
        console.print(
            "by another commit, sources, software or machine than before; the result says so"
        )


def _here(bench: Bench, jobs: Sequence[Job], start: Start, listener: JobListener) -> None:
    """Do all jobs in this process, with one model."""
    methods = {method.key: method for method in bench.config.methods}
    for job in jobs:
        try:
            record = bench.run(
                methods[job.method],
                job.seed,
                start,
                partial(listener.on_step, job),
                partial(listener.on_point, job),
            )
        except DivergedError as error:  # what the method did, no fault of this process
            listener.on_failure(job, told(error))
        else:
            listener.on_record(job, record)


def _in_order(result: Result, config: RunConfig) -> None:
    """Records in the config's order, whatever order they were finished in."""
    places = {
        (method.key, seed): (i, j)
        for i, seed in enumerate(config.seeds)
        for j, method in enumerate(config.methods)
    }
    result.records.sort(key=lambda record: places[record.method, record.seed])
    result.failures.sort(key=lambda failure: places[failure.method, failure.seed])


class _Recorder:
    """Writes records as they come, and shows what is going on."""

    def __init__(
        self, result: Result, out: Path, console: Console, progress: Progress, steps: int
    ) -> None:
        self.result, self.out, self.console = result, out, console
        self.progress, self.steps = progress, steps
        self.bars: dict[Job, TaskID] = {}
        self.alignment: dict[Job, float] = {}

    def on_step(self, job: Job, step: int, loss: float) -> None:
        state = f"task loss {loss:.3f}"
        if job in self.alignment:
            state += f"  alignment loss {self.alignment[job]:.3f}"
        self.progress.update(self._bar(job), completed=step, state=state)

    def on_point(self, job: Job, point: Point) -> None:
        self.alignment[job] = point.alignment_loss

    def on_record(self, job: Job, record: Record) -> None:
        self.result.records.append(record)
        write_result(self.result, self.out)
        self._end(job)
        seconds = record.seconds
        self.console.print(
            f"{job.name}: task loss {record.task_loss.end:.3f}, alignment loss "
            f"{record.alignment_loss.end:.3f}, refuses {record.refusal_rate.end:.0%} "
            f"({seconds.total:.0f} s, of which safety {seconds.safety:.1f} s)",
            soft_wrap=True,
            markup=False,
        )

    def on_failure(self, job: Job, error: str) -> None:
        self.result.failures.append(Failure(method=job.method, seed=job.seed, error=error))
        write_result(self.result, self.out)
        self._end(job)
        self.console.print(
            f"failed: {job.name}: {error}", style="red", soft_wrap=True, markup=False
        )

    def _bar(self, job: Job) -> TaskID:
        if job not in self.bars:
            self.bars[job] = self.progress.add_task(job.name, total=self.steps, state="")
        return self.bars[job]

    def _end(self, job: Job) -> None:
        if job in self.bars:
            self.progress.remove_task(self.bars.pop(job))
        self.progress.advance(self.progress.task_ids[0])


def _say_start(console: Console, start: Start) -> None:
    console.print(
        f"start: task loss {start.task_loss:.3f}, alignment loss {start.alignment_loss:.3f}, "
        f"refuses {start.refusal_rate:.0%} of harmful, {start.over_refusal_rate:.0%} of harmless "
        "prompts",
        soft_wrap=True,
    )


@contextmanager
def _progress(console: Console, runs: int) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        # Redrawing is for people who watch; the lines that are printed stay either way.
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task("all runs", total=runs, state="")
        yield progress
