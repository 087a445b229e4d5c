"""SafetySubspace: where the alignment loss is sharp, and what it looks like there.

The subspace is spanned by the per-example gradients of the last ``window`` safety examples. Each
refresh brings a few new examples and drops the oldest, so that one refresh costs little and the
subspace still rests on many examples:

    rows  G = [R U ; G_new]        (old gradients in the old basis, new ones from the model)
    F     = GᵀG / w = UΛUᵀ         (empirical Fisher of the window; `solvers.gram`)
    R     = G Uᵀ                   (the window's gradients in the new basis, w × k numbers)

Old losses are carried along by their own linear models, ℓ_j(c) = ℓ_j + R_j·c.

Two kinds of examples share the window. A safety example is a harmful prompt with its refusal: its
loss should return to the reference. A held example is a harmless prompt with the same refusal: its
loss should not fall below what it was, for a step after which every prompt is refused lowers A
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.basis import DenseBasis, inner_products
from safeopt.curvature.solvers import gram
from safeopt.curvature.surrogate import Surrogate


@dataclass
class SafetySubspace:
    """The top eigenspace of the safety curvature at an anchor θ_r.

    Attributes:
        basis: U, k orthonormal directions over all protected parameters.
        eigenvalues: Λ, shape ``(k,)``, float64, largest first.
        coefficients: R, shape ``(w, k)``, float64: each window example's gradient in the basis.
        losses: shape ``(w,)``, float64: each window example's alignment loss at the anchor.
        targets: shape ``(w,)``, float64: the loss below which a held example must not fall; nan for
            a safety example.
        anchor: Uᵀθ_r, shape ``(k,)``, float64; θ_r itself is not stored.
        surrogate: the quadratic model of the alignment loss around the anchor.
    """

    basis: DenseBasis
    eigenvalues: Tensor
    coefficients: Tensor
    losses: Tensor
    targets: Tensor
    anchor: Tensor
    surrogate: Surrogate

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.basis.rank

    def coordinates(self, params: Sequence[Tensor]) -> Tensor:
        """Return c = Uᵀ(θ − θ_r), shape ``(k,)``, float64."""
        return self.basis.coordinates(params) - self.anchor

    def shift(self, params: Sequence[Tensor], change: Tensor) -> None:
        """Move the parameters inside the subspace, in place: θ += U·change."""
        self.basis.expand_into(params, change)

    def restoring_step(self, limit: float, damping: float) -> Tensor:
        """Damped Gauss-Newton step that brings the window's losses back; shape ``(k,)``.

        It minimises ½Σ_j (e_j + R_j·c)² in Levenberg-Marquardt form: c = −Rᵀ(K + δ diag K)⁻¹e with
        K = RRᵀ. e_j is a safety example's excess over the limit (none below it) and a held
        example's shortfall from its target (none above it). Scaling the damping by diag K makes the
        step independent of the gradients' lengths, which differ by orders of magnitude between
        examples that the model refuses firmly and those it does not.

        Args:
            limit: the highest acceptable loss of a safety example, in nats a token.
            damping: δ > 0.
        """
        excess = torch.where(
            self.targets.isnan(),
            (self.losses - limit).clamp(min=0),
            (self.losses - self.targets).clamp(max=0),
        )
        products = self.coefficients @ self.coefficients.T
        diagonal = products.diagonal()
        # A row without a gradient has no constraint to keep; one keeps the system regular.
        regular = torch.where(diagonal > 0, diagonal * damping, torch.ones_like(diagonal))
        weights = torch.linalg.solve(products + torch.diag(regular), excess)
        return -(self.coefficients.T @ weights)

    def rebase(self, params: Sequence[Tensor], step: Tensor, value: float) -> None:
        """Make the present parameters, θ_r + U·step, the anchor; A was measured as ``value``."""
        self.losses = self.losses + self.coefficients @ step
        self.surrogate = self.surrogate.moved(step, value)
        self.anchor = self.basis.coordinates(params)


def updated_subspace(
    previous: SafetySubspace | None,
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    losses: Tensor,
    targets: Tensor,
    *,
    rank: int,
    window: int,
) -> SafetySubspace:
    """Estimate the subspace at the present parameters from new per-example gradients.

    Args:
        previous: the last estimate, whose youngest examples stay in the window; None at the start.
        params: the present parameters, one tensor each.
        rows: gradients of q new safety examples, one tensor ``(q, *p.shape)`` for each parameter.
        losses: their alignment losses, shape ``(q,)``.
        targets: the losses below which held examples must not fall, nan for safety examples;
            shape ``(q,)``.
        rank: the largest number of directions.
        window: the largest number of examples, at least q.

    Returns:
        The new estimate, anchored at ``params``. Its surrogate's value is the mean of the new
        safety losses, its gradient the mean over the window's safety examples, its scale the
        previous one's.
    """
    fresh = losses.to(torch.float64)
    targets = targets.to(fresh)
    kept = 0 if previous is None else min(window - len(fresh), len(previous.losses))
    if previous is None or kept <= 0 or previous.rank == 0:
        all_rows, all_losses, all_targets, scale = list(rows), fresh, targets, 1.0
    else:
        c = previous.coordinates(params)
        young = slice(len(previous.losses) - kept, None)
        old_losses = previous.losses[young] + previous.coefficients[young] @ c
        all_losses = torch.cat([old_losses, fresh])
        all_targets = torch.cat([previous.targets[young], targets])
        mix = previous.coefficients[young]
        all_rows = [
            torch.cat([(mix.to(block) @ block.flatten(1)).view(kept, *block.shape[1:]), row])
            for block, row in zip(previous.basis.blocks, rows, strict=True)
        ]
        scale = previous.surrogate.scale
    eigenvalues, basis = gram(all_rows, rank)
    eigenvalues = eigenvalues / len(all_losses)
    coefficients = inner_products(all_rows, basis.blocks)
    gradient = coefficients[all_targets.isnan()].mean(0)
    return SafetySubspace(
        basis,
        eigenvalues,
        coefficients,
        all_losses,
        all_targets,
        basis.coordinates(params),
        Surrogate(float(fresh[targets.isnan()].mean()), gradient, eigenvalues, scale),
    )
