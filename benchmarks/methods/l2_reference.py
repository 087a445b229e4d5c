"""AdamW with an L2 penalty that pulls towards the aligned model.

Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (L2-SP,
arXiv 1802.01483). This implementation is ours (Apache-2.0).

Simplified: with adapters the penalty is on the adapters' own entries, not on their product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel

from benchmarks.methods.pulled import Pulled, PullOptions


class L2Reference(Pulled):
    """Minimises task loss + ½·strength·‖θ − θ₀‖²."""

    Options: ClassVar[type[BaseModel]] = PullOptions

    def importance(self) -> Sequence[float]:
        return [1.0] * len(self.reference)
