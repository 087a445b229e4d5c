"""AdamW with a KL penalty to the aligned model on the refusal tokens of safety examples.

The penalty of RLHF (Ouyang et al. 2022, arXiv 2203.02155), put on safety prompts. This
implementation is ours (Apache-2.0).

Simplified: the divergence runs from the aligned model to the trained one, on the refusals of the
safety examples; there it runs the other way, on what the trained model has sampled. It is a lower
bound from the 32 most likely tokens and one remainder class.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup
from benchmarks.methods.safety_gradient import KLGradient, KLOptions


class KLReference(AdamW):
    """Minimises task loss + weight·KL(π_θ₀ ‖ π_θ)."""

    Options: ClassVar[type[BaseModel]] = KLOptions

    def __init__(self, setup: Setup, options: KLOptions) -> None:
        super().__init__(setup, options)
        self.weight = options.weight
        self.kl_gradient = KLGradient(setup, options, self.cost)

    def after_backward(self) -> None:
        for parameter, gradient in zip(self.setup.params, self.kl_gradient(), strict=True):
            if parameter.grad is not None:
                parameter.grad += self.weight * gradient
