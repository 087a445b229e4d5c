"""Vectors of an operator as rows of one tensor, and the operations that all solvers share.

A block of k vectors is a tensor ``(k, n)`` in the operator's dtype; inner products are summed in
float64, and everything of size k×k stays in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from safeopt.curvature.basis import inner_products
from safeopt.rows import as_matrix, exact_products


class SymmetricOperator(Protocol):
    """What a solver needs to know of an operator."""

    @property
    def shapes(self) -> Sequence[torch.Size]:
        """Shapes of the tensors that make up a vector."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors, float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Device on which the solver works."""

    def matmat(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products with k vectors, tensors of shape ``(k, *shape)``."""

    def retained(self) -> AbstractContextManager[None]:
        """Keep between products what saves work."""


class RowSpace:
    """The vector space of an operator, with a source of random vectors and a count of products.

    Args:
        operator: the matrix.
        seed: seed of the random vectors.
    """

    def __init__(self, operator: SymmetricOperator, seed: int) -> None:
        self.operator = operator
        self.sizes = [shape.numel() for shape in operator.shapes]
        self.size = sum(self.sizes)
        self.spent = 0
        self._generator = torch.Generator().manual_seed(seed)

    def empty(self, count: int = 0) -> Tensor:
        """Room for ``count`` vectors."""
        return torch.empty(
            (count, self.size), dtype=self.operator.dtype, device=self.operator.device
        )

    def random(self, count: int) -> Tensor:
        """Standard normal vectors."""
        drawn = torch.randn(
            (count, self.size),
            generator=self._generator,
            dtype=self.operator.dtype,
            device="cpu",
        )
        return drawn.to(self.operator.device)

    def signs(self, count: int) -> Tensor:
        """Vectors of independent signs ±1."""
        return torch.sign(self.random(count))

    def flat(self, blocks: Sequence[Tensor]) -> Tensor:
        """Blocks of tensors as rows; a copy."""
        device, dtype = self.operator.device, self.operator.dtype
        return torch.cat([as_matrix(b).to(device, dtype) for b in blocks], dim=1)

    def blocks(self, rows: Tensor) -> list[Tensor]:
        """Rows as blocks of tensors; views."""
        parts = rows.split(self.sizes, dim=1)
        return [
            part.unflatten(1, shape) if shape else part.squeeze(1)
            for part, shape in zip(parts, self.operator.shapes, strict=True)
        ]

    def products(self, rows: Tensor) -> Tensor:
        """The operator's products with rows.

        Raises:
            ValueError: if a product is not finite.
        """
        self.spent += len(rows)
        result = self.flat(self.operator.matmat(self.blocks(rows)))
        if not bool(torch.isfinite(result).all()):
            raise ValueError("operator: a product is not finite; check the loss of a batch")
        return result

    def remove(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Make rows orthogonal to an orthonormal basis, in place.

        Returns:
            What was removed, the inner products ``(len(rows), len(basis))``, float64.
        """
        total = torch.zeros(len(rows), len(basis), dtype=torch.float64, device=rows.device)
        for _ in range(2):  # twice is enough (Giraud, Langou and Rozloznik 2005)
            total += self._remove_once(rows, basis)
        return total

    def orthonormal(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Orthonormal rows for the span of ``rows`` outside of an orthonormal basis.

        Rows that depend on others are left out, so that there may be fewer of them, or none.
        """
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-30)
        for _ in range(2):
            self._remove_once(rows, basis)
            count = 0
            for i in range(len(rows)):
                row = rows[i : i + 1]
                self.remove(row, rows[:count])  # of nearly dependent rows once is not enough
                length = torch.linalg.vector_norm(row)
                if length > 100 * torch.finfo(rows.dtype).eps:
                    rows[count] = row[0] / length
                    count += 1
            rows = rows[:count]
        return rows

    def rounding(self, scale: Tensor) -> float:
        """The length that rounding leaves of a product with a matrix of size ``scale``."""
        return float(20 * torch.finfo(self.operator.dtype).eps * scale.abs().max())

    @staticmethod
    def _remove_once(rows: Tensor, basis: Tensor) -> Tensor:
        overlap = inner_products([rows], [basis])
        with exact_products(rows.device):
            rows.addmm_(overlap.to(rows), basis, alpha=-1)
        return overlap
