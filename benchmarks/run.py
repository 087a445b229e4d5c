"""From a config to a result: every method with every seed, one after another, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.config import TINY, ConfigError, MethodConfig, RunConfig
from benchmarks.data.datasets import labelled_refusals
from benchmarks.environment import PeakMemory, environment
from benchmarks.evaluation import Evaluator, Losses, Rates
from benchmarks.judge import judge_quality
from benchmarks.methods import Setup, method_class
from benchmarks.models import load, trainable
from benchmarks.records import Judge, Point, Record, Result, Span, read_result, write_result
from benchmarks.tasks import batches, material, single_batches
from benchmarks.training import train


def run(config: RunConfig, out: Path, console: Console) -> Result:
    """Do the runs that are not yet in ``out/result.json``, and add each when it is finished.

    Args:
        config: what to run.
        out: the folder of the result.
        console: where the progress is shown.

    Raises:
        ConfigError: if ``out`` holds the result of another config.
    """
    result = read_result(out)
    if result is not None and result.config != config.as_json():
        raise ConfigError(
            f"{out}: holds the result of another config; choose another --out, or remove the folder"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if result is None:
        result = Result(environment=environment(), config=config.as_json())
    pending = [
        (method, seed)
        for seed in config.seeds
        for method in config.methods
        if result.find(method.key, seed) is None
    ]
    if not pending:
        console.print(f"{out}: all {len(result.records)} runs are there already")
        return result
    if result.records:
        console.print(f"{out}: {len(result.records)} runs are there, {len(pending)} to go")
    if result.judge is None and config.model.name != TINY:
        result.judge = Judge.model_validate(judge_quality(labelled_refusals()))
    bench = _Bench(config, console)
    start = bench.start(result)
    with _progress(console) as progress:
        for method, seed in pending:
            result.records.append(bench.run(method, seed, start, progress))
            write_result(result, out)
    return result


class _Bench:
    """The model and the data, shared by all runs of a config."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.console = console
        with console.status(f"loading {config.model.name} and {config.task.name}"):
            self.model, tokenizer = load(config.model)
            self.material = material(config, tokenizer)
        self.evaluator = Evaluator(self.material, tokenizer, config.evaluation.new_tokens)

    def start(self, result: Result) -> tuple[Losses, Rates]:
        """The starting point, the same for all methods and seeds: from a record, or measured."""
        for record in result.records:
            return (
                Losses(task=record.task_loss.start, alignment=record.alignment_loss.start),
                Rates(
                    refusal=record.refusal_rate.start, over_refusal=record.over_refusal_rate.start
                ),
            )
        with self.console.status("measuring the starting point"):
            losses, rates = self.evaluator.losses(self.model), self.evaluator.rates(self.model)
        self.console.print(
            f"start: task loss {losses.task:.3f}, alignment loss {losses.alignment:.3f}, "
            f"refuses {rates.refusal:.0%} of harmful, {rates.over_refusal:.0%} of harmless prompts",
            soft_wrap=True,
        )
        return losses, rates

    def run(
        self, method: MethodConfig, seed: int, start: tuple[Losses, Rates], progress: Progress
    ) -> Record:
        """One method with one seed."""
        config = self.config
        device = next(self.model.parameters()).device
        learning_rate = method.learning_rate or config.learning_rate
        bar = progress.add_task(f"{method.key}, seed {seed}", total=config.steps, state="")
        points: list[Point] = []

        def on_step(step: int, loss: float) -> None:
            alignment = points[-1].alignment_loss if points else start[0].alignment
            state = f"task loss {loss:.3f}  alignment loss {alignment:.3f}"
            progress.update(bar, completed=step, state=state)

        def on_point(point: Point) -> None:
            points.append(point)
            if not self.console.is_terminal:  # a log has no bar
                self.console.print(
                    f"{method.key}, seed {seed}, step {point.step}/{config.steps}: task loss "
                    f"{point.task_loss:.3f}, alignment loss {point.alignment_loss:.3f}",
                    soft_wrap=True,
                )

        with trainable(self.model, config.lora, seed) as (model, params), PeakMemory() as memory:
            rival = method_class(method.name)(
                Setup(
                    model=model,
                    params=params,
                    safety=single_batches(self.material.safety, seed, device),
                    harmless=single_batches(self.material.harmless_refused, seed, device),
                    learning_rate=learning_rate,
                    seed=seed,
                ),
                method.options(),
            )
            trajectory = train(
                model,
                rival,
                batches(
                    self.material.train,
                    config.batch_size,
                    config.steps,
                    seed,
                    self.material.pad,
                    device,
                ),
                config.steps,
                start[0],
                self.evaluator.losses,
                config.evaluation.every,
                on_step,
                on_point,
            )
            began = perf_counter()
            with rival.evaluating():
                rates = self.evaluator.rates(model)
            seconds = perf_counter() - began
        trajectory.seconds.evaluation += seconds
        trajectory.seconds.total += seconds
        last = trajectory.curve[-1]
        record = Record(
            method=method.key,
            model=config.model.name,
            task=config.task.name,
            seed=seed,
            steps=config.steps,
            learning_rate=learning_rate,
            batch_tokens=trajectory.tokens.task / max(1, trajectory.passes.task_forward),
            curve=trajectory.curve,
            alignment_loss=Span(start=start[0].alignment, end=last.alignment_loss),
            task_loss=Span(start=start[0].task, end=last.task_loss),
            refusal_rate=Span(start=start[1].refusal, end=rates.refusal),
            over_refusal_rate=Span(start=start[1].over_refusal, end=rates.over_refusal),
            seconds=trajectory.seconds,
            passes=trajectory.passes,
            tokens=trajectory.tokens,
            peak_bytes=memory.bytes,
        )
        _say(progress, record)
        return record


def _say(progress: Progress, record: Record) -> None:
    progress.console.print(
        f"{record.method}, seed {record.seed}: task loss {record.task_loss.end:.3f}, "
        f"alignment loss {record.alignment_loss.end:.3f}, refuses {record.refusal_rate.end:.0%} "
        f"({record.seconds.total:.0f} s, of which safety {record.seconds.safety:.1f} s)",
        soft_wrap=True,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        # Redrawing is for people who watch; the lines that are printed stay either way.
        disable=not console.is_terminal,
    ) as progress:
        yield progress
