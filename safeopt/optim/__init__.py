"""Optimizers that keep a model's alignment, and the table that lists them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from safeopt.optim.preconditioned_sgd import PreconditionedSGD
from safeopt.optim.projected_adamw import ProjectedAdamW
from safeopt.optim.safeguard import safeguard
from safeopt.optim.safety_sam import SafetySAM

__all__ = [
    "OptimizerInfo",
    "PreconditionedSGD",
    "ProjectedAdamW",
    "SafetySAM",
    "optimizers",
    "safeguard",
]


@dataclass(frozen=True)
class OptimizerInfo:
    """One line of the table of optimizers.

    Attributes:
        cls: the optimizer class; all take ``params``, ``lr``, ``weight_decay``, ``probe`` and the
            safety arguments of `SafetyConfig` as keywords.
        summary: what it does, in one line.
        needs: what it asks of the training loop and of the user, beyond AdamW.
    """

    cls: type[Optimizer]
    summary: str
    needs: str


def optimizers() -> dict[str, OptimizerInfo]:
    """The optimizers of this package by the name that the command line uses."""
    return {
        "projected-adamw": OptimizerInfo(
            ProjectedAdamW,
            "AdamW, then a proximal step in the safety subspace",
            "nothing",
        ),
        "safety-sam": OptimizerInfo(
            SafetySAM,
            "AdamW at a point displaced inside the safety subspace, then the same step",
            "eval() before the model is evaluated, train() afterwards (Trainer calls them)",
        ),
        "preconditioned-sgd": OptimizerInfo(
            PreconditionedSGD,
            "SGD divided by the safety curvature, (I + UΛUᵀ/τ)⁻¹",
            "a learning rate of SGD's size",
        ),
    }
