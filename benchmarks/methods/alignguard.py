"""The AlignGuard penalty, from the package ``alignment-risk`` (MIT).

Das et al. 2025, "AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition
and Riemannian-Geodesic Collision Regularization" (arXiv 2508.02079). The package computes the
penalties of the update's two parts, inside and outside the Fisher subspace, and of their collision.

Simplified: the package's own estimator of the subspace flattens the model's gradients one example
at a time; the same empirical Fisher is taken from `safeopt.SafetyProbe` here, in one pass. With
adapters, whose B is zero at the start, it sees the gradients of B only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup
from safeopt import SafetyProbe
from safeopt.curvature.solvers import gram


class AlignGuardOptions(BaseModel):
    """Options of `AlignGuard`.

    Attributes:
        strength: factor of all three penalties; 1 is the package's choice.
        rank: directions of the Fisher subspace.
    """

    model_config = ConfigDict(extra="forbid")
    strength: float = Field(default=1.0, ge=0)
    rank: int = Field(default=32, ge=1)


class AlignGuard(AdamW):
    """Minimises task loss + strength × the package's penalties."""

    Options: ClassVar[type[BaseModel]] = AlignGuardOptions

    def __init__(self, setup: Setup, options: AlignGuardOptions) -> None:
        # The package is an optional part of the benchmark.
        from alignment_risk import (
            AlignGuardConfig,
            AlignGuardLoRARegularizer,
            SensitivitySubspace,
        )

        super().__init__(setup, options)
        params = list(setup.params)
        probe = SafetyProbe(setup.model, setup.safety[: options.rank])
        with self.cost.clock():
            rows = probe.per_example(params).rows
            eigenvalues, basis = gram(rows, options.rank)
            flat = torch.cat([row.flatten(1) for row in rows], 1)
            names = {id(p): name for name, p in setup.model.named_parameters()}
            defaults = AlignGuardConfig()
            self.regularizer = AlignGuardLoRARegularizer(
                setup.model,
                subspace=SensitivitySubspace(
                    parameter_slices=[],
                    fisher_eigenvalues=(eigenvalues / len(flat)).to(flat),
                    fisher_eigenvectors=torch.cat([b.flatten(1) for b in basis.blocks], 1).T,
                    fisher_diagonal=flat.square().mean(0),
                    module_scores={},
                    top_weight_indices=torch.empty(0, dtype=torch.long),
                    top_weight_scores=torch.empty(0),
                ),
                parameter_names=[names[id(p)] for p in params],
                config=AlignGuardConfig(
                    lambda_a=options.strength * defaults.lambda_a,
                    lambda_t=options.strength * defaults.lambda_t,
                    lambda_nc=options.strength * defaults.lambda_nc,
                ),
            )
        self.cost.add_passes(probe.passes)

    def after_backward(self) -> None:
        with self.cost.clock(), torch.enable_grad():
            nothing = torch.zeros((), device=self.setup.params[0].device)
            self.regularizer.regularized_loss(nothing).total_loss.backward()
