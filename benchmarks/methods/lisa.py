"""Lisa: training alternates between the task and safety data, and stays near where it switched.

Huang et al. 2024, "Lisa: Lazy Safety Alignment for Large Language Models against Harmful
Fine-tuning Attack" (arXiv 2405.18641). This implementation is ours (Apache-2.0), from the paper's
algorithm.

Simplified: the steps on safety data are added to the task's steps, so that the task sees the same
batches as under every other method (the paper divides a fixed number of steps between both). The
proximal term acts from the first step (the authors' code leaves it out of the first tenth). The
safety data is refusals only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import RoundRobin, Setup, joined, snapshot
from safeopt.losses import refusal_nll


class LisaOptions(BaseModel):
    """Options of `Lisa`.

    Attributes:
        proximal: ρ of the proximal term ½ρ‖θ − θ_switch‖².
        task_steps: between two switches to the safety data.
        safety_steps: on the safety data after each switch.
        batch_size: safety examples in a step.
    """

    model_config = ConfigDict(extra="forbid")
    proximal: float = Field(default=1.0, ge=0)
    task_steps: int = Field(default=8, ge=1)
    safety_steps: int = Field(default=1, ge=1)
    batch_size: int = Field(default=4, ge=1)


class Lisa(AdamW):
    """Every step minimises its state's loss + ½·proximal·‖θ − θ_switch‖²."""

    Options: ClassVar[type[BaseModel]] = LisaOptions

    def __init__(self, setup: Setup, options: LisaOptions) -> None:
        super().__init__(setup, options)
        self.options = options
        self.examples = RoundRobin(list(setup.safety))
        self.switched_at = snapshot(setup.params)
        self.steps = 0

    def after_backward(self) -> None:
        with self.cost.clock(), torch.no_grad():
            for parameter, switched in zip(self.setup.params, self.switched_at, strict=True):
                if parameter.grad is not None:
                    parameter.grad += self.options.proximal * (parameter - switched)

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.options.task_steps == 0:
            self._safety_state()

    def finish(self) -> None:
        if self.steps % self.options.task_steps:  # after task steps it is at its worst
            self._safety_state()

    def _safety_state(self) -> None:
        self.switched_at = snapshot(self.setup.params)
        for _ in range(self.options.safety_steps):
            batch = joined([self.examples.next() for _ in range(self.options.batch_size)])
            with self.cost.clock(), torch.enable_grad():
                self.optimizer.zero_grad()
                refusal_nll(self.setup.model, batch).mean().backward()
            self.after_backward()
            with self.cost.clock():
                self.optimizer.step()
            self.cost.add(batch, backward=True)
        self.switched_at = snapshot(self.setup.params)
