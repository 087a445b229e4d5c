"""Optimizers that keep a model's alignment, and the table that lists them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from safeopt.optim.projected_adamw import ProjectedAdamW
from safeopt.optim.safeguard import safeguard

__all__ = ["OptimizerInfo", "ProjectedAdamW", "optimizers", "safeguard"]


@dataclass(frozen=True)
class OptimizerInfo:
    """One line of the table of optimizers.

    Attributes:
        cls: the optimizer class; all take ``probe`` and the safety arguments as keywords.
        summary: what it does, in one line.
    """

    cls: type[Optimizer]
    summary: str


def optimizers() -> dict[str, OptimizerInfo]:
    """The optimizers of this package by the name that the command line uses."""
    return {
        "projected-adamw": OptimizerInfo(
            ProjectedAdamW, "AdamW, then a proximal step in the safety subspace"
        ),
    }
