"""What the quadratic penalties share: AdamW with ½·strength·Σ wᵢ(θᵢ − θ₀ᵢ)² added to the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, snapshot


class PullOptions(BaseModel):
    """Options of a quadratic penalty.

    Attributes:
        strength: the factor λ of the penalty, at least 0.
    """

    model_config = ConfigDict(extra="forbid")
    strength: float = Field(default=1.0, ge=0)


class Pulled(AdamW):
    """Adds the penalty's gradient, λ·w ⊙ (θ − θ₀), to the task's, in closed form."""

    def __init__(self, setup: Setup, options: PullOptions) -> None:
        super().__init__(setup, options)
        self.strength = options.strength
        self.reference = snapshot(setup.params)
        self.weights = self.importance()

    def importance(self) -> Sequence[Tensor | float]:
        """The weight w of each parameter tensor's entries."""
        raise NotImplementedError

    def after_backward(self) -> None:
        with self.cost.clock(), torch.no_grad():
            for parameter, reference, weight in zip(
                self.setup.params, self.reference, self.weights, strict=True
            ):
                if parameter.grad is not None:
                    parameter.grad += self.strength * weight * (parameter - reference)
