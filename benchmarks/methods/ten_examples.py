"""AdamW, and after it a few steps on ten refusals.

The cheapest repair that people use: refusals come back from very few examples (Bianchi et al. 2024,
arXiv 2309.07875). This implementation is ours (Apache-2.0). Nothing is simplified.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, joined
from safeopt.losses import refusal_nll


class TenExamplesOptions(BaseModel):
    """Options of `TenExamples`.

    Attributes:
        steps: on the examples, after training.
        examples: all of them in every step.
    """

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(default=5, ge=1)
    examples: int = Field(default=10, ge=1)


class TenExamples(AdamW):
    """Training, then ``steps`` steps of a new AdamW on the refusal NLL of the examples."""

    Options: ClassVar[type[BaseModel]] = TenExamplesOptions

    def __init__(self, setup: Setup, options: TenExamplesOptions) -> None:
        super().__init__(setup, options)
        self.options = options
        self.batch = joined(setup.safety[: options.examples])

    def finish(self) -> None:
        repair = self.build_optimizer()
        for _ in range(self.options.steps):
            with self.cost.clock(), torch.enable_grad():
                repair.zero_grad()
                refusal_nll(self.setup.model, self.batch).mean().backward()
                repair.step()
            self.cost.add(self.batch, backward=True)
