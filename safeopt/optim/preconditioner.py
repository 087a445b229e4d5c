"""The inverse (I + UΛUᵀ/τ)⁻¹ of the safety curvature, applied to a step that was already taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.rows import row_dtype

Indefinite = Literal["abs", "clip"]


class SafetyPreconditioner:
    """M of (I + UΛUᵀ/τ)⁻¹ = I − U M Uᵀ, computed once for each subspace.

    Args:
        tau: τ; None for λ̄/``relative``.
        relative: κR, see `safeopt.optim.preconditioned_sgd`.
        indefinite: what becomes of negative eigenvalues.
    """

    def __init__(self, tau: float | None, relative: float, indefinite: Indefinite) -> None:
        self._tau = tau
        self._relative = relative
        self._indefinite = indefinite
        self._inverse: tuple[SafetySubspace, Tensor] | None = None  # what M belongs to, and M

    def matrix(self, subspace: SafetySubspace, params: Sequence[Tensor]) -> Tensor:
        """M, shape ``(k, k)``, float64."""
        if self._inverse is None or self._inverse[0] is not subspace:
            values = subspace.eigenvalues
            values = values.abs() if self._indefinite == "abs" else values.clamp(min=0)
            tau = self._tau or float(values.mean()) / self._relative
            overlap = gram_matrix(subspace, params)
            self._inverse = subspace, woodbury(values, overlap, tau)
        return self._inverse[1]


def woodbury(eigenvalues: Tensor, overlap: Tensor, tau: float) -> Tensor:
    """M of (I + UΛUᵀ/τ)⁻¹ = I − U M Uᵀ.

    Args:
        eigenvalues: the diagonal of Λ, shape ``(k,)``, float64, not negative.
        overlap: UᵀU, shape ``(k, k)``, float64.
        tau: τ ≥ 0; 0 only where all eigenvalues are 0 as well.

    Returns:
        Shape ``(k, k)``, float64: Λ^½ (τI + Λ^½ UᵀU Λ^½)⁻¹ Λ^½, symmetric.
    """
    if not bool((eigenvalues > 0).any()):
        return torch.zeros_like(overlap)
    root = eigenvalues.sqrt()
    inner = root.unsqueeze(1) * overlap * root
    inner.diagonal().add_(tau)
    factor = torch.linalg.cholesky(inner)
    half = torch.linalg.solve_triangular(factor, torch.diag(root), upper=False)
    return half.T @ half


def gram_matrix(subspace: SafetySubspace, params: Sequence[Tensor]) -> Tensor:
    """UᵀU of the basis as it is stored, shape ``(k, k)``, float64.

    Cost: k expansions and k times the coordinates; one number for each parameter.
    """
    columns = []
    column = [torch.zeros_like(p, dtype=row_dtype(p)) for p in params]
    for unit in torch.eye(subspace.rank, dtype=torch.float64, device=subspace.eigenvalues.device):
        for part in column:
            part.zero_()
        subspace.basis.expand_into(column, unit)
        columns.append(subspace.basis.coordinates(column))
    overlap = torch.stack(columns)
    return 0.5 * (overlap + overlap.T)
