"""AdamW projected off the safety subspace of the aligned model, which is never refreshed.

The first-order defence whose failure the theory predicts: Springer et al. 2026 (arXiv 2602.15799).
This implementation is ours (Apache-2.0). Nothing is simplified. With adapters, whose B is zero at
the start, the subspace sees the gradients of B only.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from benchmarks.methods.base import TaskLoss
from benchmarks.methods.fixed_subspace import FixedSubspace, RankOptions
from safeopt import SafetyProbe
from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.solvers import gram


class StaticProjection(FixedSubspace):
    """U spans the per-example gradients of ``rank`` safety examples at the aligned model."""

    Options: ClassVar[type[BaseModel]] = RankOptions

    def estimate(self, task_loss: TaskLoss) -> DenseBasis:
        probe = SafetyProbe(self.setup.model, self.setup.safety[: self.rank])
        rows = probe.per_example(list(self.setup.params)).rows
        self.cost.add_passes(probe.passes)
        return gram(rows, self.rank)[1]
