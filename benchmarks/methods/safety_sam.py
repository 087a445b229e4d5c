"""Ours: `safeopt.SafetySAM` around AdamW, sharpness-aware inside the safety subspace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from pydantic import BaseModel

from benchmarks.methods.base import TaskLoss
from benchmarks.methods.protected import ProtectedMethod, ProtectedOptions
from safeopt import SafetySAM


class SafetySAMOptions(ProtectedOptions):
    """Any argument of `safeopt.SafetySAM`, but for the base optimizer, which is AdamW."""

    optimizer_class = SafetySAM
    renamed: ClassVar[dict[str, str]] = {"protection": "mode"}

    @classmethod
    def arguments_known(cls) -> set[str]:
        return super().arguments_known() - {"base_optimizer"}


class SafetySAMMethod(ProtectedMethod):
    """AdamW at a displaced point, protected."""

    Options: ClassVar[type[BaseModel]] = SafetySAMOptions

    def step(self, task_loss: TaskLoss) -> float:
        if self.optimizer.mode == "lookahead":
            return super().step(task_loss)
        # The second of the two passes is made for safety's sake, and its time is charged to it.
        passes = 0

        def closure() -> torch.Tensor:
            nonlocal passes
            passes += 1
            with self._paused() if passes == 1 else nullcontext():
                self.optimizer.zero_grad()
                loss = task_loss()
                loss.backward()
            return loss.detach()

        with self._clock.clock():
            loss = self.optimizer.step(closure)
        return float(loss)

    def _paused(self) -> AbstractContextManager[None]:
        """Take the time of the block off the clock."""
        return self._clock.clock(sign=-1)

    def evaluating(self) -> AbstractContextManager[None]:
        return self.optimizer.unperturbed()
