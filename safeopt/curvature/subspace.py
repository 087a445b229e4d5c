"""SafetySubspace: where the alignment loss is sharp, and what it looks like there.

The subspace is spanned by the per-example gradients of the last ``window`` safety examples. Each
refresh brings a few new examples and drops the oldest, so that one refresh costs little and the
subspace still rests on many examples:

    rows  G = [R U ; G_new]        (old gradients in the old basis, new ones from the model)
    F     = GᵀG / w = UΛUᵀ         (empirical Fisher of the window; `solvers.gram`)
    R     = G Uᵀ                   (the window's gradients in the new basis, w × k numbers)

How old examples are carried to a new anchor, and all of them brought back, stands in
`safeopt.curvature.window`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.bases import empty_basis
from safeopt.curvature.basis import Basis
from safeopt.curvature.solvers import gram
from safeopt.curvature.surrogate import Surrogate
from safeopt.curvature.window import Window
from safeopt.distributed import ALONE, Layout
from safeopt.rows import DenseRows, GradientRows, coarsest


@dataclass
class SafetySubspace:
    """The top eigenspace of the safety curvature at an anchor θ_r.

    Attributes:
        basis: U, k orthonormal directions over all protected parameters.
        eigenvalues: Λ, shape ``(k,)``, float64, largest first.
        window: the latest examples as linear models in the k coordinates.
        anchor: Uᵀθ_r, shape ``(k,)``, float64; θ_r itself is not stored.
        surrogate: the quadratic model of the alignment loss around the anchor.
    """

    basis: Basis
    eigenvalues: Tensor
    window: Window
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

    def rebase(self, params: Sequence[Tensor], step: Tensor, value: float) -> None:
        """Make the present parameters, θ_r + U·step, the anchor; A was measured as ``value``."""
        self.window = self.window.moved(step)
        self.surrogate = self.surrogate.moved(step, value)
        self.anchor = self.basis.coordinates(params)


def updated_subspace(
    previous: SafetySubspace | None,
    params: Sequence[Tensor],
    rows: Sequence[Tensor] | GradientRows,
    losses: Tensor,
    tokens: Tensor,
    targets: Tensor,
    *,
    rank: int,
    window: int,
    kind: str = "dense",
    layout: Layout = ALONE,
) -> SafetySubspace:
    """Estimate the subspace at the present parameters from new per-example gradients.

    Args:
        previous: the last estimate, whose youngest examples stay in the window; None at the start.
        params: the present parameters, one tensor each.
        rows: gradients of q new safety examples, one tensor ``(q, *p.shape)`` for each parameter or
            in another storage; `factored` and `compressed` bases need `FactoredRows`.
        losses: their alignment losses, shape ``(q,)``.
        tokens: their numbers of response tokens, see `Window`; shape ``(q,)``.
        targets: the losses below which held examples must not fall, nan for safety examples;
            shape ``(q,)``.
        rank: the largest number of directions.
        window: the largest number of examples; where q is larger, the new ones alone stay.
        kind: how the basis is stored, see `safeopt.curvature.bases`; ``previous`` keeps its own.
        layout: how the parameters lie over the processes.

    Returns:
        The new estimate, anchored at ``params``. Its surrogate's value is the mean of the new
        safety losses and its gradient the mean over the window's safety examples.
    """
    # A model whose layers lie on several devices may compute its losses on another one.
    fresh = losses.to(params[0].device, torch.float64)
    tokens, targets = tokens.to(fresh), targets.to(fresh)
    value = float(fresh[targets.isnan()].mean())
    kept = 0 if previous is None else min(window - len(fresh), len(previous.window))
    basis = empty_basis(kind, params, layout) if previous is None else previous.basis
    carried = torch.zeros(0, basis.rank, dtype=torch.float64, device=fresh.device)
    if previous is not None and kept > 0 and previous.rank > 0:
        old = previous.window.moved(previous.coordinates(params)).latest(kept)
        carried = old.coefficients
        fresh = torch.cat([old.losses, fresh])
        tokens, targets = torch.cat([old.tokens, tokens]), torch.cat([old.targets, targets])
    new = DenseRows(rows, layout) if isinstance(rows, Sequence) else rows
    together = basis.window(carried, new)
    eigenvalues, basis = gram(together, rank, coarsest(new.dtypes))
    eigenvalues = eigenvalues / len(fresh)
    examples = Window(together.coordinates(basis), fresh, tokens, targets)
    gradient = examples.coefficients[examples.safety].mean(0)
    return SafetySubspace(
        basis,
        eigenvalues,
        examples,
        basis.coordinates(params),
        Surrogate(value, gradient, eigenvalues),
    )
