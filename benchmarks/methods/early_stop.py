"""AdamW that stops, and goes back, when the alignment loss on safety examples has risen too much.

A standard safeguard of practitioners; this implementation is ours (Apache-2.0). Nothing is
simplified. It protects by not learning: compare it at matched task loss.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, TaskLoss, joined, snapshot, write
from safeopt.losses import refusal_nll


class EarlyStopOptions(BaseModel):
    """Options of `EarlyStop`.

    Attributes:
        tolerance: accepted rise of the alignment loss, in nats per token.
        every: steps between two looks.
        examples: safety examples at which is looked.
    """

    model_config = ConfigDict(extra="forbid")
    tolerance: float = Field(default=0.1, gt=0)
    every: int = Field(default=2, ge=1)
    examples: int = Field(default=8, ge=1)


class EarlyStop(AdamW):
    """Looks every few steps; keeps the last parameters that were good and ends with them."""

    Options: ClassVar[type[BaseModel]] = EarlyStopOptions

    def __init__(self, setup: Setup, options: EarlyStopOptions) -> None:
        super().__init__(setup, options)
        self.options = options
        self.batch = joined(setup.safety[: options.examples])
        self.good = snapshot(setup.params)
        self.limit = self._alignment_loss() + options.tolerance
        self.stopped = False
        self.steps = 0
        self.last_loss = float("nan")

    def step(self, task_loss: TaskLoss) -> float:
        # After the stop nothing is computed any more: the saved passes are its merit.
        if not self.stopped:
            self.last_loss = super().step(task_loss)
        return self.last_loss

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.options.every == 0:
            self._look()

    def finish(self) -> None:
        if not self.stopped and self.steps % self.options.every:
            self._look()

    def _look(self) -> None:
        if not self._alignment_loss() <= self.limit:  # nor is a loss that is no number good
            write(self.setup.params, self.good)
            self.stopped = True
        else:
            self.good = snapshot(self.setup.params)

    def _alignment_loss(self) -> float:
        with self.cost.clock(), torch.no_grad():
            loss = float(refusal_nll(self.setup.model, self.batch).mean())
        self.cost.add(self.batch, backward=False)
        return loss
