"""AdamW with elastic weight consolidation: a quadratic penalty with the safety Fisher's diagonal.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (arXiv 1612.00796).
This implementation is ours (Apache-2.0).

Simplified: the diagonal is that of the empirical Fisher matrix (observed refusals, not sampled
ones) at the aligned model. With adapters, whose B is zero there, the gradients of A are zero, and
so is its penalty: that is what the method gives for adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from benchmarks.methods.base import Setup
from benchmarks.methods.pulled import Pulled, PullOptions
from safeopt import SafetyProbe


class EWCOptions(PullOptions):
    """Options of `EWC`.

    Attributes:
        strength: the factor λ of the penalty, at least 0.
        examples: safety examples for the Fisher matrix.
    """

    strength: float = Field(default=100.0, ge=0)
    examples: int = Field(default=32, ge=1)


class EWC(Pulled):
    """Minimises task loss + ½·strength·Σ Fᵢᵢ(θᵢ − θ₀ᵢ)², Fᵢᵢ the mean of squared gradients."""

    Options: ClassVar[type[BaseModel]] = EWCOptions

    def __init__(self, setup: Setup, options: EWCOptions) -> None:
        self.examples = options.examples
        super().__init__(setup, options)

    def importance(self) -> Sequence[Tensor]:
        probe = SafetyProbe(self.setup.model, self.setup.safety[: self.examples])
        with self.cost.clock():
            rows = probe.per_example(self.setup.params).rows
            fisher = [row.square().mean(0) for row in rows]
        self.cost.add_passes(probe.passes)
        return fisher
