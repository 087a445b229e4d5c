"""What the rivals share that follow the gradient of a KL divergence to the aligned model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from benchmarks.methods.base import Batch, RoundRobin, SafetyCost, Setup, joined
from safeopt import ReferenceKL

CHUNK = 16


class KLOptions(BaseModel):
    """Options of the methods that use the divergence.

    Attributes:
        weight: of the divergence beside the task loss.
        examples: safety examples whose reference is kept, each for one forward pass at the start;
            None for all. After so many the first ones come round again.
        batch_size: of them in one step.
    """

    model_config = ConfigDict(extra="forbid")
    weight: float = Field(default=1.0, gt=0)
    examples: int | None = Field(default=32, ge=1)
    batch_size: int = Field(default=1, ge=1)


class KLGradient:
    """The gradient of KL(π_θ₀ ‖ π_θ) on the refusal tokens of a few safety examples.

    The reference is kept for the 32 most likely tokens of each position and the remainder as one
    class (`safeopt.ReferenceKL`), which takes one forward pass at the start.
    """

    def __init__(self, setup: Setup, options: KLOptions, cost: SafetyCost) -> None:
        self.setup, self.cost = setup, cost
        self.divergence = ReferenceKL()
        chosen: Sequence[Batch] = setup.safety[: options.examples]
        self.examples = RoundRobin(list(chosen))
        self.batch_size = min(options.batch_size, len(chosen))
        model = setup.model
        model.eval()
        with cost.clock():
            for start in range(0, len(chosen), CHUNK):
                batch = joined(chosen[start : start + CHUNK])
                self.divergence.cache(model, batch)
                cost.add(batch, backward=False)
        model.train()

    def __call__(self) -> list[Tensor]:
        """One tensor for each trainable parameter: one forward and one backward pass."""
        batch = joined([self.examples.next() for _ in range(self.batch_size)])
        with self.cost.clock(), torch.enable_grad():
            loss = self.divergence(self.setup.model, batch).mean()
            gradients = torch.autograd.grad(loss, list(self.setup.params), allow_unused=True)
        self.cost.add(batch, backward=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.setup.params, gradients, strict=True)
        ]
