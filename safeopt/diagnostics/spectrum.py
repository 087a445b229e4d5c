"""The spectrum of the safety curvature, read off the Gram matrix of m safety gradients.

F = GᵀG/m has the eigenvalues of K = GGᵀ/m, so m numbers say all that m examples can say:

- λ_k, the k-th eigenvalue, and the tail Σ_{j>k} λ_j, the two figures of low-rank sensitivity;
- the effective rank (Σλ)²/Σλ² (participation ratio): k for k equal eigenvalues and none else.

m examples never show more than m directions. Independent gradients of equal length, the opposite
of a low rank, would show a tail share of 1 − k/m and an effective rank of m: compare with these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Eigenvalues below this share of the largest are rounding, not curvature.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of the Gram matrix K = GGᵀ/m.

    Attributes:
        eigenvalues: all m of K, shape ``(m,)``, float64, largest first, none negative.
        vectors: its eigenvectors V as columns, shape ``(m, m)``.
    """

    eigenvalues: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Spectrum:
        """Diagonalise ⟨g_i, g_j⟩, shape ``(m, m)``, float64: O(m³), no pass through the model."""
        values, vectors = torch.linalg.eigh(gram / len(gram))
        return cls(values.flip(0).clamp(min=0), vectors.flip(1))

    @property
    def trace(self) -> float:
        """Tr F, the mean squared length of a safety gradient."""
        return float(self.eigenvalues.sum())

    @property
    def effective_rank(self) -> float:
        """(Σλ)²/Σλ², between 1 and m; 0 without any curvature."""
        squares = float(self.eigenvalues.square().sum())
        return self.trace**2 / squares if squares > 0 else 0.0

    def rank(self, largest: int) -> int:
        """Number of directions, at most ``largest``, that are more than rounding."""
        floor = _FLOOR * self.eigenvalues[0]
        return min(largest, int((self.eigenvalues > floor).sum()))

    def tail(self, rank: int) -> float:
        """Σ_{j>k} λ_j."""
        return float(self.eigenvalues[rank:].sum())

    def coordinates(self, along: Tensor, rank: int) -> Tensor:
        """Uᵀv of the top k directions, from the inner products G·v.

        U = GᵀVΛ^{-1/2}/√m, so Uᵀv = Λ^{-1/2}Vᵀ(G·v)/√m: U itself is never formed.

        Args:
            along: G·v, shape ``(m,)`` or ``(m, q)`` for q vectors.
            rank: k, at most `rank`.
        """
        directions = self.vectors[:, :rank] / (len(along) * self.eigenvalues[:rank]).sqrt()
        return directions.T @ along
