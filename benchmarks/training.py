"""One run: a plain training loop, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from benchmarks.evaluation import Losses
from benchmarks.methods import Method
from benchmarks.methods.base import Batch
from benchmarks.records import Passes, Point, Seconds, Tokens
from benchmarks.tasks import task_loss
from safeopt.losses import response_log_probs
from safeopt.timing import clock

Listener = Callable[[int, float], None]


@dataclass
class Trajectory:
    """What happened in a run.

    Attributes:
        curve: the measured points, the starting point first.
        seconds: of training and evaluation.
        passes: calls of the model in training.
        tokens: that went through them.
    """

    curve: list[Point]
    seconds: Seconds = field(default_factory=Seconds)
    passes: Passes = field(default_factory=Passes)
    tokens: Tokens = field(default_factory=Tokens)


class StepLoss:
    """The task loss of one batch, which counts how often it is evaluated."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.forward = 0
        self.backward = 0

    def __call__(self) -> Tensor:
        return self._counted(task_loss(self.model, self.batch))

    def log_probs(self) -> tuple[Tensor, Tensor]:
        log_probs, targets = response_log_probs(self.model, self.batch)
        return self._counted(log_probs), targets

    def _counted(self, output: Tensor) -> Tensor:
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._count_backward)
        return output

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1


def train(
    model: nn.Module,
    method: Method,
    batches: Iterable[Batch],
    steps: int,
    start: Point,
    measure: Callable[[nn.Module], Losses],
    every: int,
    on_step: Listener,
    on_point: Callable[[Point], None],
) -> Trajectory:
    """Train and measure.

    Args:
        model: in training mode.
        method: built for this model.
        batches: one for each step.
        steps: their number.
        start: the curve's first point, measured before; if it has the prompts' losses, the others
            get theirs too.
        measure: returns the losses of the model as it is.
        every: steps between two measurements; the last step is always measured.
        on_step: called after each step with its number and the batch's loss.
        on_point: called after each measurement.
    """
    run = Trajectory([start])
    trained, set_up = 0.0, method.cost.seconds
    for step, batch in enumerate(batches, start=1):
        loss = StepLoss(model, batch)
        began = clock()
        value = method.step(loss)
        if step == steps:
            method.finish()
        trained += clock() - began
        run.passes.task_forward += loss.forward
        run.passes.task_backward += loss.backward
        tokens = int(batch["attention_mask"].sum())
        run.tokens.task += loss.forward * tokens
        on_step(step, value)
        if step % every == 0 or step == steps:
            began = clock()
            with method.evaluating():
                now = measure(model)
            run.seconds.evaluation += clock() - began
            point = Point(
                step=step,
                task_loss=now.task,
                alignment_loss=now.alignment,
                seconds=trained,
                prompts=None if start.prompts is None else now.prompts,
            )
            run.curve.append(point)
            on_point(point)
    cost = method.cost
    run.seconds.safety = cost.seconds
    run.seconds.task = trained - (cost.seconds - set_up)
    run.seconds.total = set_up + trained + run.seconds.evaluation
    run.passes.safety_forward, run.passes.safety_backward = cost.forward, cost.backward
    run.tokens.safety_forward = cost.forward_tokens
    run.tokens.safety_backward = cost.backward_tokens
    return run
