"""Storage of the basis U of the safety subspace.

`DenseBasis` keeps one tensor of shape ``(k, *p.shape)`` for each parameter, so that it can be moved
and sharded with the parameter. Memory: k numbers for each protected parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns multiplied in the rows' own dtype; the products of these chunks are summed in float64.
_CHUNK = 1 << 14


class DenseBasis:
    """k orthonormal directions in the space of all protected parameters.

    Args:
        blocks: one tensor for each parameter, shape ``(k, *p.shape)``, float32 or float64; together
            their rows are orthonormal.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = list(blocks)

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.blocks[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the basis occupies."""
        return sum(block.nbytes for block in self.blocks)

    def coordinates(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Uᵀv for a vector v given as one tensor for each parameter.

        Args:
            tensors: shapes of the parameters; None stands for zeros.

        Returns:
            Shape ``(k,)``, float64, summed over the parameters in float64.
        """
        total = torch.zeros(self.rank, dtype=torch.float64, device=self.blocks[0].device)
        for block, tensor in zip(self.blocks, tensors, strict=True):
            if tensor is not None and block.numel():
                row = tensor.detach().reshape(1, -1).to(block.dtype)
                total += _products(block.flatten(1), row).squeeze(1).to(total.device)
        return total

    @torch.no_grad()
    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place: θ += U(c⁺ − c).

        Args:
            tensors: one for each parameter; changed in place in their own dtype.
            coordinates: shape ``(k,)``.
        """
        for block, tensor in zip(self.blocks, tensors, strict=True):
            if block.numel():
                step = coordinates.to(block) @ block.flatten(1)
                tensor.add_(step.view(tensor.shape).to(tensor.dtype))

    def inner(self, other: DenseBasis) -> Tensor:
        """Return UᵀW, the inner products with another basis; shape ``(k, k_other)``, float64."""
        return inner_products(self.blocks, other.blocks)

    def rows(self, scale: Tensor) -> list[Tensor]:
        """Return the directions times ``scale (k,)``: rows whose Gram matrix is diag(scale²)."""
        return [block * scale.to(block).view(-1, *[1] * (block.dim() - 1)) for block in self.blocks]


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products of rows, summed over the parameters.

    Args:
        left: one tensor for each parameter, shape ``(m, *p.shape)``.
        right: likewise, shape ``(l, *p.shape)``.

    Returns:
        Shape ``(m, l)``, float64.
    """
    device = left[0].device
    total = torch.zeros(left[0].shape[0], right[0].shape[0], dtype=torch.float64, device=device)
    for a, b in zip(left, right, strict=True):
        if a.numel() and b.numel():
            total += _products(a.flatten(1), b.flatten(1)).to(total.device)
    return total


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left·rightᵀ in float64. float32 alone loses three digits over ten million columns."""
    whole = left.shape[1] // _CHUNK * _CHUNK
    total = (left[:, whole:] @ right[:, whole:].T).to(torch.float64)
    if whole:
        a, b = (x[:, :whole].unflatten(1, (-1, _CHUNK)).transpose(0, 1) for x in (left, right))
        total += (a @ b.transpose(1, 2)).sum(0, dtype=torch.float64)
    return total
