"""Eigensolvers for the safety curvature.

`gram` is exact for a curvature that is a sum of outer products, F = Σ_i w_i g_i g_iᵀ (the Fisher
matrix): the m×m matrix of inner products has the same nonzero eigenvalues as the n×n matrix F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from safeopt.curvature.basis import Basis, DenseBasis, WindowRows
from safeopt.rows import DenseRows, coarsest

# Directions below this share of the largest eigenvalue are rounding, not curvature.
_RELATIVE_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}


@overload
def gram(rows: Sequence[Tensor], rank: int) -> tuple[Tensor, DenseBasis]: ...


@overload
def gram(rows: WindowRows, rank: int, dtype: torch.dtype) -> tuple[Tensor, Basis]: ...


def gram(
    rows: Sequence[Tensor] | WindowRows, rank: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Basis]:
    """Top eigenpairs of F = Σ_i g_i g_iᵀ from its m×m Gram matrix.

    With K = GGᵀ = VΣ²Vᵀ the eigenvalues of F are Σ² and its eigenvectors U = GᵀVΣ⁻¹. U is then
    orthonormalised once more by a Cholesky factor, which removes what rounding in K has left.

    Args:
        rows: G, one tensor for each parameter, shape ``(m, *p.shape)``, float32 or float64, or any
            other storage, see `safeopt.curvature.basis`. Fold weights in beforehand, as √w_i g_i.
        rank: the largest number of directions wanted, at least 1.
        dtype: the coarsest in which the rows were computed, if they are no tensors.

    Returns:
        Eigenvalues, shape ``(k,)``, float64, largest first, and the basis; k is at most ``rank``
        and smaller where G has fewer independent rows. k = 0 if all rows are zero.

    Raises:
        ValueError: if ``rank`` is smaller than 1 or the rows hold a value that is not finite.

    Cost for tensors: 2·m²·n + 4·m·k·n operations, no pass through the model; k·n numbers.
    """
    if rank < 1:
        raise ValueError(
            f"rank={rank}: the safety subspace needs at least one direction (rank >= 1)"
        )
    if isinstance(rows, Sequence):
        dtype = coarsest(row.dtype for row in rows)
        none = torch.zeros(0, 0, dtype=torch.float64, device=rows[0].device)
        rows = DenseBasis([row[:0] for row in rows]).window(none, DenseRows(rows))
    assert dtype is not None
    products = rows.products()
    if not bool(torch.isfinite(products).all()):
        raise ValueError("rows: a safety gradient is not finite; no curvature can be estimated")
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = values[0].clamp(min=0) * _RELATIVE_FLOOR[dtype]
    count = min(rank, int((values > floor).sum()))
    values, vectors = values[:count], vectors[:, :count]
    basis, kept = rows.directions((vectors / values.sqrt()).T)
    return values[kept.to(values.device)], basis
