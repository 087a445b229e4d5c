"""AdamW projected off the task's own sharpest directions: is it safety's subspace that matters?

The control that knows curvature, but the wrong one. The top eigenspace (by magnitude) of the task
Hessian on the first batch, by Lanczos. This implementation is ours (Apache-2.0).

Simplified: one batch stands for the task, at the aligned model; the subspace is not refreshed.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from benchmarks.methods.base import Setup, TaskLoss
from benchmarks.methods.fixed_subspace import FixedSubspace, RankOptions
from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.krylov import lanczos
from safeopt.curvature.operators import HessianOperator


class TaskHessianOptions(RankOptions):
    """Options of `TaskHessian`.

    Attributes:
        rank: number of directions.
        max_products: Hessian-vector products after which the estimate is taken as it is.
    """

    max_products: int = Field(default=100, ge=1)


class TaskHessian(FixedSubspace):
    """U holds the eigenvectors of the ``rank`` largest |λ| of the task Hessian."""

    Options: ClassVar[type[BaseModel]] = TaskHessianOptions

    def __init__(self, setup: Setup, options: TaskHessianOptions) -> None:
        super().__init__(setup, options)
        self.max_products = options.max_products

    def estimate(self, task_loss: TaskLoss) -> DenseBasis:
        operator = HessianOperator(
            self.setup.model, [task_loss.batch], "causal_lm", params=list(self.setup.params)
        )
        found = lanczos(
            operator,
            self.rank,
            tolerance=1e-2,
            max_products=max(self.max_products, self.rank + 2),
            seed=self.setup.seed,
        )
        tokens = int(task_loss.batch["attention_mask"].sum())
        counts = operator.counts
        self.cost.forward += counts.forward
        self.cost.backward += counts.backward + counts.double_backward
        self.cost.forward_tokens += counts.forward * tokens
        self.cost.backward_tokens += (counts.backward + counts.double_backward) * tokens
        return found.basis
