"""AdamW projected off a random subspace: what the projection alone does, without any knowledge.

The control of equal rank. This implementation is ours (Apache-2.0). Nothing is simplified.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel

from benchmarks.methods.base import TaskLoss
from benchmarks.methods.fixed_subspace import FixedSubspace, RankOptions
from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.solvers import gram


class RandomSubspace(FixedSubspace):
    """U spans ``rank`` Gaussian vectors drawn from the run's seed."""

    Options: ClassVar[type[BaseModel]] = RankOptions

    def estimate(self, task_loss: TaskLoss) -> DenseBasis:
        generator = torch.Generator().manual_seed(self.setup.seed)
        rows = [
            torch.randn((self.rank, *p.shape), generator=generator).to(p.device)
            for p in self.setup.params
        ]
        return gram(rows, self.rank)[1]
