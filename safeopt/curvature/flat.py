"""FlatBlocks: the directions over many parameters in few contiguous matrices.

Every step reads U twice, for Uᵀθ with Uᵀg and for θ += U·δ, and is bound by the memory's speed.
With one small product for each parameter (LoRA on a small model has hundreds) it would be bound by
the number of calls instead. So the blocks of neighbouring parameters are columns of one matrix, and
a parameter's own block is a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from safeopt.rows import flat_combination, flat_products

# Columns of one matrix: enough for its products to take much longer than their call, few enough
# for a copy of a matrix to be small beside all of them.
_WIDTH = 1 << 20


class Segment(NamedTuple):
    """Neighbouring parameters of one device and dtype.

    Attributes:
        matrix: their directions, shape ``(k, n)``.
        members: their places in the list of all parameters.
        sizes: their numbers of columns.
    """

    matrix: Tensor
    members: range
    sizes: list[int]


class FlatBlocks:
    """Directions over all parameters.

    Args:
        blocks: one tensor for each parameter, shape ``(k, *p.shape)``; copied.

    Attributes:
        segments: the matrices.
        blocks: for each parameter its part, shape ``(k, *p.shape)``, a view.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.segments: list[Segment] = []
        self.blocks: list[Tensor] = []
        for members in _neighbours(blocks):
            sizes = [blocks[i].shape[1:].numel() for i in members]
            rank = len(blocks[members[0]])
            parts = [blocks[i].reshape(rank, n) for i, n in zip(members, sizes, strict=True)]
            matrix = torch.cat(parts, dim=1)
            self.segments.append(Segment(matrix, members, sizes))
            shapes = [blocks[i].shape for i in members]
            columns = matrix.split(sizes, dim=1)
            self.blocks += [c.view(shape) for c, shape in zip(columns, shapes, strict=True)]

    @torch.no_grad()
    def products(self, vectors: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Inner products with vectors given as one tensor for each parameter; None for zeros.

        Returns:
            Shape ``(l, k)``, float64. The matrices are read from memory once for all vectors.
        """
        first = self.blocks[0]
        total = torch.zeros(len(vectors), len(first), dtype=torch.float64, device=first.device)
        for segment in self.segments:
            chosen = [[vector[i] for i in segment.members] for vector in vectors]
            if not segment.matrix.numel() or all(t is None for part in chosen for t in part):
                continue
            rows = _rows(segment, chosen)
            if len(rows) == 1:
                # Rounding depends on the number of rows. A step reads U for two vectors: with as
                # many for one, Uᵀθ is the same to the bit where nothing has moved.
                rows = torch.cat([rows, torch.zeros_like(rows)])
            products = flat_products(rows, segment.matrix)[: len(vectors)]
            total += products.to(first.device)
        return total

    @torch.no_grad()
    def add_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add the combination of the directions to ``tensors``, in place and in their dtypes."""
        for segment in self.segments:
            chosen = [tensors[i] for i in segment.members if tensors[i].numel()]
            if not segment.matrix.numel():
                continue
            step = flat_combination(coordinates.to(segment.matrix), segment.matrix)
            # In C++: a view in Python for each of hundreds of parameters is as slow as the product.
            parts = _unflatten_dense_tensors(step, chosen)
            if any(tensor.dtype != step.dtype for tensor in chosen):
                parts = [p.to(t.dtype) for p, t in zip(parts, chosen, strict=True)]
            torch._foreach_add_(chosen, parts)


def _neighbours(blocks: Sequence[Tensor]) -> Iterator[range]:
    """Runs of blocks that share a device and a dtype, of about `_WIDTH` columns."""
    before = [0, *accumulate(block.shape[1:].numel() for block in blocks)]
    keys = [(b.device, b.dtype, before[i] // _WIDTH) for i, b in enumerate(blocks)]
    for _, run in groupby(range(len(blocks)), key=keys.__getitem__):
        members = list(run)
        yield range(members[0], members[-1] + 1)


def _rows(segment: Segment, vectors: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """A segment's parts of vectors as rows, shape ``(l, n)``."""
    parts = []
    for vector in vectors:
        for tensor, size in zip(vector, segment.sizes, strict=True):
            part = segment.matrix.new_zeros(size) if tensor is None else tensor
            parts.append(part if part.dtype == segment.matrix.dtype else part.to(segment.matrix))
    return _flatten_dense_tensors(parts).view(len(vectors), -1)
