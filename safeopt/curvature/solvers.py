"""Eigensolvers for the safety curvature.

`gram` is exact for a curvature that is a sum of outer products, F = Σ_i w_i g_i g_iᵀ (the Fisher
matrix): the m×m matrix of inner products has the same nonzero eigenvalues as the n×n matrix F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safeopt.curvature.basis import DenseBasis, inner_products

# Directions below this share of the largest eigenvalue are rounding, not curvature.
_RELATIVE_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}


def gram(rows: Sequence[Tensor], rank: int) -> tuple[Tensor, DenseBasis]:
    """Top eigenpairs of F = Σ_i g_i g_iᵀ from its m×m Gram matrix.

    With K = GGᵀ = VΣ²Vᵀ the eigenvalues of F are Σ² and its eigenvectors U = GᵀVΣ⁻¹. U is then
    orthonormalised once more by a Cholesky factor, which removes what rounding in K has left.

    Args:
        rows: G, one tensor for each parameter, shape ``(m, *p.shape)``, float32 or float64. Fold
            weights in beforehand, as √w_i g_i.
        rank: the largest number of directions wanted, at least 1.

    Returns:
        Eigenvalues, shape ``(k,)``, float64, largest first, and the basis; k is at most ``rank``
        and smaller where G has fewer independent rows. k = 0 if all rows are zero.

    Raises:
        ValueError: if ``rank`` is smaller than 1 or the rows hold a value that is not finite.

    Cost: 2·m²·n + 4·m·k·n operations, no pass through the model; k·n numbers.
    """
    if rank < 1:
        raise ValueError(
            f"rank={rank}: the safety subspace needs at least one direction (rank >= 1)"
        )
    products = inner_products(rows, rows)
    if not bool(torch.isfinite(products).all()):
        raise ValueError("rows: a safety gradient is not finite; no curvature can be estimated")
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = values[0].clamp(min=0) * _RELATIVE_FLOOR[rows[0].dtype]
    kept = min(rank, int((values > floor).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    mix = (vectors / values.sqrt()).T
    blocks = [_mix(mix, row) for row in rows]
    if kept:
        overlap = torch.linalg.cholesky(inner_products(blocks, blocks))
        correction = torch.linalg.inv(overlap)
        blocks = [_mix(correction, block) for block in blocks]
    return values, DenseBasis(blocks)


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Linear combinations of rows: ``weights (k, m)`` times ``rows (m, *shape)``."""
    return (weights.to(rows) @ rows.flatten(1)).view(weights.shape[0], *rows.shape[1:])
