"""AdamW, unprotected: the baseline that every other method is measured against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from pydantic import BaseModel

from benchmarks.methods.base import NoOptions, SafetyCost, Setup, TaskLoss


class AdamW:
    """``torch.optim.AdamW`` with its defaults and the run's learning rate."""

    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, setup: Setup, options: BaseModel) -> None:
        self.setup = setup
        self.cost = SafetyCost()
        self.optimizer = self.build_optimizer()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.setup.params, lr=self.setup.learning_rate)

    def step(self, task_loss: TaskLoss) -> float:
        self.optimizer.zero_grad()
        loss = task_loss()
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.after_step()
        return float(loss.detach())

    def after_backward(self) -> None:
        """Where a method changes the gradient before the optimizer uses it."""

    def after_step(self) -> None:
        """Where a method changes the parameters after the optimizer has."""

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass
