"""What the static projections share: AdamW that never leaves a subspace's orthogonal complement."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, TaskLoss
from safeopt.curvature.basis import DenseBasis


class RankOptions(BaseModel):
    """Options of a fixed subspace.

    Attributes:
        rank: number of its directions.
    """

    model_config = ConfigDict(extra="forbid")
    rank: int = Field(default=32, ge=1)


class FixedSubspace(AdamW):
    """After every step of AdamW, Uᵀ(θ − θ₀) is put back to zero; U is made once."""

    def __init__(self, setup: Setup, options: RankOptions) -> None:
        super().__init__(setup, options)
        self.rank = options.rank
        self.basis: DenseBasis | None = None
        self.anchor: Tensor | None = None

    def estimate(self, task_loss: TaskLoss) -> DenseBasis:
        """The directions, orthonormal; called once, before the first step."""
        raise NotImplementedError

    def step(self, task_loss: TaskLoss) -> float:
        if self.basis is None:
            with self.cost.clock():
                self.basis = self.estimate(task_loss)
                self.anchor = self.basis.coordinates(list(self.setup.params))
        return super().step(task_loss)

    def after_step(self) -> None:
        assert self.basis is not None
        assert self.anchor is not None
        params = list(self.setup.params)
        with self.cost.clock():
            self.basis.expand_into(params, self.anchor - self.basis.coordinates(params))
