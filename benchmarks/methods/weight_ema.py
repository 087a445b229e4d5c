"""AdamW, measured at the exponential moving average of its parameters.

Kim et al. 2025, "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective" (arXiv
2508.12531) find that small learning rates and this average keep most of the refusals. This
implementation is ours (Apache-2.0). The average starts at the aligned model, as there. Nothing is
simplified.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, holding, snapshot


class WeightEMAOptions(BaseModel):
    """Options of `WeightEMA`.

    Attributes:
        decay: share of the old average that stays at each step.
    """

    model_config = ConfigDict(extra="forbid")
    decay: float = Field(default=0.95, ge=0, lt=1)


class WeightEMA(AdamW):
    """θ̄ ← decay·θ̄ + (1 − decay)·θ after each step; θ̄ is what counts."""

    Options: ClassVar[type[BaseModel]] = WeightEMAOptions

    def __init__(self, setup: Setup, options: WeightEMAOptions) -> None:
        super().__init__(setup, options)
        self.decay = options.decay
        self.average = snapshot(setup.params)

    def after_step(self) -> None:
        with self.cost.clock(), torch.no_grad():
            for average, parameter in zip(self.average, self.setup.params, strict=True):
                average.lerp_(parameter.detach(), 1 - self.decay)

    def evaluating(self) -> AbstractContextManager[None]:
        return holding(self.setup.params, self.average)
