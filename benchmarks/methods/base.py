"""What every rival is built from, what it does at each step, and what its safety work costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from safeopt import PassCounter
from safeopt.data import collate
from safeopt.timing import clock

Batch = Mapping[str, Tensor]


class SafetyCost(PassCounter):
    """What a method spends on safety, beyond the task's own passes.

    ``seconds`` holds the arithmetic that turns the passes into protection, too.
    """

    @contextmanager
    def clock(self, sign: int = 1) -> Iterator[None]:
        """Add the time of the block to ``seconds``; with ``sign=-1`` take it off again."""
        start = clock()
        try:
            yield
        finally:
            self.seconds += sign * (clock() - start)

    def add(self, batch: Batch, *, backward: bool) -> None:
        """Count one pass over a batch: forward, and backward where there was one."""
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.count(tokens, backward=backward)

    def add_passes(self, passes: PassCounter) -> None:
        """Count what a `safeopt.SafetyProbe` has counted; the time is taken by `clock`."""
        self.include(replace(passes, seconds=0.0))


@dataclass(frozen=True)
class Setup:
    """What a method may use. It is the same for all methods of one model, task and seed.

    Attributes:
        model: the model, with adapters if the run uses any; in training mode.
        params: its trainable parameters.
        safety: unpadded safety examples (harmful prompt and refusal), in an order drawn from the
            seed; each has ``input_ids`` and ``labels`` of shape ``(1, T)``.
        harmless: likewise harmless prompts, each with the same refusal, for methods that watch
            that these are not refused; none of them is measured.
        learning_rate: of the base optimizer.
        seed: for whatever the method draws itself.
        unaligned: returns the weights of the model before it was aligned, by their names in the
            model without adapters; None where there is no such model.
    """

    model: nn.Module
    params: Sequence[nn.Parameter]
    safety: Sequence[Batch]
    harmless: Sequence[Batch]
    learning_rate: float
    seed: int
    unaligned: Callable[[], Mapping[str, Tensor]] | None = None


class TaskLoss(Protocol):
    """The task loss of this step's batch: every call is one forward pass."""

    batch: Batch

    def __call__(self) -> Tensor:
        """Return the loss with its graph; the method decides what to do with it."""
        ...

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """As `safeopt.losses.response_log_probs`, for methods with a loss of their own.

        It is one forward pass of the task, as a call is.
        """
        ...


class NoOptions(BaseModel):
    """Options of a method that has none."""

    model_config = ConfigDict(extra="forbid")


class Method(Protocol):
    """One rival.

    A step is given the task loss as a function, so that a method may add a penalty to it, change
    the gradient it leaves behind, evaluate it twice (sharpness-aware minimisation) or not at all
    (a step on safety data instead). What is done once after training belongs into `finish`.
    """

    Options: ClassVar[type[BaseModel]]

    def __init__(self, setup: Setup, options: Any) -> None: ...

    @property
    def cost(self) -> SafetyCost:
        """What the method has spent on safety so far."""
        ...

    def step(self, task_loss: TaskLoss) -> float:
        """Take one training step and return the task loss of the batch before it."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """The weights that count when the model is measured, for methods that train others."""
        ...

    def finish(self) -> None:
        """What is left to do at the end of training, before the last measurement."""
        ...


@dataclass
class RoundRobin:
    """Hands out safety examples one after another, again from the start when all were used."""

    examples: Sequence[Batch]
    position: int = field(default=0, init=False)

    def next(self) -> Batch:
        """The next example."""
        example = self.examples[self.position % len(self.examples)]
        self.position += 1
        return example


def joined(examples: Sequence[Batch], pad: int = 0) -> dict[str, Tensor]:
    """Safety examples as one batch, padded on the left; shape ``(m, T)``."""
    rows = [{name: tensor[0].tolist() for name, tensor in example.items()} for example in examples]
    device = examples[0]["input_ids"].device
    return {name: tensor.to(device) for name, tensor in collate(rows, pad, side="left").items()}


def snapshot(params: Sequence[Tensor]) -> list[Tensor]:
    """A copy of the parameters as they are."""
    return [p.detach().clone() for p in params]


@contextmanager
def holding(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters have these values inside, and their own again afterwards."""
    own = snapshot(params)
    write(params, values)
    try:
        yield
    finally:
        write(params, own)


@torch.no_grad()
def write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into the parameters."""
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)
