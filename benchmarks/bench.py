"""One run of a config: a method with a seed, from the aligned model to a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.config import MethodConfig, RunConfig
from benchmarks.environment import PeakMemory
from benchmarks.evaluation import Evaluator
from benchmarks.methods import Setup, method_class
from benchmarks.models import load, trainable, unaligned
from benchmarks.records import Point, Record, Span, Start
from benchmarks.separation import separation
from benchmarks.tasks import batches, material, single_batches
from benchmarks.training import Listener, train
from safeopt.timing import clock


class DivergedError(RuntimeError):
    """Training has left all bounds: a loss is not finite."""


class Bench:
    """The model and the data, shared by all runs of a config in one process.

    Args:
        config: what to run. Its number of threads is set for the whole process.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.model, tokenizer = load(config.model)
        self.material = material(config, tokenizer)
        self.evaluator = Evaluator(self.material, tokenizer, config.evaluation, config.task.name)
        self._start: Start | None = None

    def measure_start(self) -> Start:
        """The model before training, the same for all methods and seeds."""
        return self.evaluator.start(self.model)

    def setup(
        self, method: MethodConfig, seed: int, model: nn.Module, params: Sequence[nn.Parameter]
    ) -> Setup:
        """What a method is built from.

        Args:
            method: an entry of the config.
            seed: of the order of the prompts and what the method draws.
            model: the model with its adapters.
            params: what is trained.
        """
        device = next(model.parameters()).device
        return Setup(
            model=model,
            params=params,
            safety=single_batches(self.material.safety, seed, device),
            harmless=single_batches(self.material.harmless_refused, seed, device),
            learning_rate=method.learning_rate or self.config.learning_rate,
            seed=seed,
            unaligned=unaligned(self.config.model),
        )

    def task_batches(self, seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The training batches of a run."""
        config = self.config
        return batches(
            self.material.train, config.batch_size, config.steps, seed, self.material.pad, device
        )

    def run(
        self,
        method: MethodConfig,
        seed: int,
        start: Start,
        on_step: Listener,
        on_point: Callable[[Point], None],
    ) -> Record:
        """One method with one seed; the model is as before afterwards.

        Args:
            method: an entry of the config.
            seed: of the data's order, the adapters and what the method draws.
            start: as `measure_start` gave it, here or in another process.
            on_step: called after each step with its number and the batch's loss.
            on_point: called after each measurement.

        Raises:
            DivergedError: if a loss is not finite.
        """
        config = self.config
        device = next(self.model.parameters()).device
        if start.answers is not None and self._start is not start:
            self.evaluator.keep_reference(self.model, start.answers)
            self._start = start

        def finite(point: Point) -> None:
            if not (math.isfinite(point.task_loss) and math.isfinite(point.alignment_loss)):
                raise DivergedError(
                    f"step {point.step}: task loss {point.task_loss}, alignment loss "
                    f"{point.alignment_loss}"
                )
            on_point(point)

        with trainable(self.model, config.lora, seed) as (model, params), PeakMemory() as memory:
            setup = self.setup(method, seed, model, params)
            rival = method_class(method.name)(setup, method.options())
            trajectory = train(
                model,
                rival,
                self.task_batches(seed, device),
                config.steps,
                Point(
                    step=0,
                    task_loss=start.task_loss,
                    alignment_loss=start.alignment_loss,
                    seconds=0,
                    prompts=start.prompts,
                ),
                self.evaluator.losses,
                config.evaluation.every,
                on_step,
                finite,
            )
            began = clock()
            with rival.evaluating():
                rates = self.evaluator.rates(model)
                divergence = self.evaluator.harmless_kl(model)
                metric = self.evaluator.task_metric(model)
                scores = self.evaluator.refusal_nll(model)
            seconds = clock() - began
        trajectory.seconds.evaluation += seconds
        trajectory.seconds.total += seconds
        last = trajectory.curve[-1]
        return Record(
            method=method.key,
            model=config.model.name,
            task=config.task.name,
            seed=seed,
            steps=config.steps,
            learning_rate=setup.learning_rate,
            batch_tokens=trajectory.tokens.task / max(1, trajectory.passes.task_forward),
            curve=trajectory.curve,
            alignment_loss=Span(start=start.alignment_loss, end=last.alignment_loss),
            task_loss=Span(start=start.task_loss, end=last.task_loss),
            refusal_rate=Span(start=start.refusal_rate, end=rates.refusal),
            over_refusal_rate=Span(start=start.over_refusal_rate, end=rates.over_refusal),
            seconds=trajectory.seconds,
            passes=trajectory.passes,
            tokens=trajectory.tokens,
            peak_bytes=memory.bytes,
            harmless_kl=divergence,
            task_metric=_span(start.task_metric, metric),
            separation=_span(start.separation, None if scores is None else separation(scores)),
            refusal_nll=scores if config.evaluation.per_prompt else None,
        )


def _span(start: float | None, end: float | None) -> Span | None:
    """Both, where the config asks for the figure."""
    return None if start is None or end is None else Span(start=start, end=end)
