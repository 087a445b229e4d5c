"""Int8Basis: the dense basis in eight bits a number, a quarter of float32.

Each direction of each parameter is cut into blocks of 64 numbers, which are stored as whole numbers
from -127 to 127 and one float32 scale, the block's largest magnitude (absmax quantisation). Rounded
directions are not quite orthonormal, so a k×k matrix W in float64 stands before them:

    U = W·D,        W (D Dᵀ) Wᵀ = I,        D the rounded directions

and UᵀU = I holds again. Numbers are restored a few columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeopt.curvature.basis import CarriedRows, whitening
from safeopt.rows import GradientRows, as_matrix, flat_products, mixed, row_dtype

_BLOCK = 64
# Restored numbers in a temporary tensor, at most: 64 MiB in float32.
_TEMPORARY = 1 << 24


@dataclass(frozen=True)
class Quantised:
    """D for one parameter with n numbers.

    Attributes:
        codes: shape ``(k, n)``, int8.
        scales: shape ``(k, ceil(n / 64))``, float32: the largest magnitude of each block, by 127.
    """

    codes: Tensor
    scales: Tensor

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """D's columns in parts: where they are, and their values ``(k, columns)``."""
        step = _columns(len(self.codes))
        for low in range(0, self.codes.shape[1], step):
            part = slice(low, min(low + step, self.codes.shape[1]))
            scales = self.scales[:, low // _BLOCK : -(-part.stop // _BLOCK)]
            spread = scales.repeat_interleave(_BLOCK, dim=1)[:, : part.stop - low]
            yield part, self.codes[:, part].to(dtype) * spread.to(dtype)


class Int8Basis:
    """k orthonormal directions, k bytes (and a sixteenth of that for scales) for each parameter.

    Args:
        blocks: D, one for each parameter.
        weights: W, shape ``(k, k)``, float64.
        dtypes: in which each parameter's part is computed.
    """

    kind: ClassVar[str] = "int8"

    def __init__(
        self, blocks: Sequence[Quantised], weights: Tensor, dtypes: Sequence[torch.dtype]
    ) -> None:
        self.blocks = list(blocks)
        self.weights = weights
        self.dtypes = list(dtypes)

    @classmethod
    def empty(cls, params: Sequence[Tensor]) -> Int8Basis:
        """The basis without a direction."""
        blocks = [
            quantised(p.detach().new_empty((0, p.numel()), dtype=torch.float32)) for p in params
        ]
        weights = torch.zeros(0, 0, dtype=torch.float64, device=params[0].device)
        return cls(blocks, weights, [row_dtype(p) for p in params])

    @classmethod
    def from_state(cls, state: Mapping[str, Any], params: Sequence[Tensor]) -> Int8Basis:
        """The basis of a `state_dict`, on the parameters' devices; its tensors are not copied.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        rank = len(state["weights"])
        shapes = [(tuple(c.shape), tuple(s.shape)) for c, s in state["blocks"]]
        sizes = [p.numel() for p in params]
        fit = shapes == [((rank, n), (rank, -(-n // _BLOCK))) for n in sizes]
        if not (fit and state["weights"].shape == (rank, rank)):
            raise ValueError(
                f"its shapes do not fit the parameters ({len(shapes)} blocks of rank {rank} for "
                f"{len(params)} parameters)"
            )
        blocks = [
            Quantised(codes.to(p.device), scales.to(p.device))
            for (codes, scales), p in zip(state["blocks"], params, strict=True)
        ]
        weights = state["weights"].to(params[0].device)
        return cls(blocks, weights, [row_dtype(p) for p in params])

    def state_dict(self) -> dict[str, Any]:
        """Codes and scales of each parameter, and W."""
        blocks = [[block.codes, block.scales] for block in self.blocks]
        return {"kind": self.kind, "blocks": blocks, "weights": self.weights}

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return len(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes that the basis occupies."""
        return sum(b.codes.nbytes + b.scales.nbytes for b in self.blocks) + self.weights.nbytes

    def coordinates(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Uᵀv, shape ``(k,)``, float64; None stands for zeros."""
        total = torch.zeros(self.rank, dtype=torch.float64, device=self.weights.device)
        for block, dtype, tensor in zip(self.blocks, self.dtypes, tensors, strict=True):
            if tensor is not None:
                row = tensor.detach().reshape(1, -1).to(dtype)
                for part, values in block.chunks(dtype):
                    total += flat_products(values, row[:, part]).squeeze(1).to(total.device)
        return self.weights @ total

    @torch.no_grad()
    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place, in their own dtype."""
        inner = coordinates.to(self.weights) @ self.weights
        for block, dtype, tensor in zip(self.blocks, self.dtypes, tensors, strict=True):
            step = torch.zeros(tensor.numel(), dtype=dtype, device=tensor.device)
            for part, values in block.chunks(dtype):
                step[part] = mixed(inner[None], values)[0]
            tensor.add_(step.view(tensor.shape).to(tensor.dtype))

    def inner(self, other: Int8Basis) -> Tensor:
        """Inner products with another basis, shape ``(k, k_other)``, float64."""
        total = torch.zeros(self.rank, other.rank, dtype=torch.float64, device=self.weights.device)
        for mine, theirs, dtype in zip(self.blocks, other.blocks, self.dtypes, strict=True):
            total += _between(mine, theirs, dtype).to(total.device)
        return self.weights @ total @ other.weights.T

    def coordinates_of(self, rows: GradientRows) -> Tensor:
        """Rows in the basis, shape ``(m, k)``, float64."""
        total = torch.zeros(len(rows), self.rank, dtype=torch.float64, device=self.weights.device)
        for index, (block, dtype) in enumerate(zip(self.blocks, self.dtypes, strict=True)):
            if self.rank:
                row = as_matrix(rows.block(index))
                for part, values in block.chunks(dtype):
                    total += flat_products(row[:, part], values).to(total.device)
        return total @ self.weights.T

    def window(self, coefficients: Tensor, rows: GradientRows) -> CarriedRows:
        """Old gradients in this basis, ``coefficients (w, k)``, followed by new ones."""
        return CarriedRows(self, coefficients, rows)

    def updated(self, left: Tensor, right: Tensor, rows: GradientRows) -> tuple[Int8Basis, Tensor]:
        """Directions left·U + right·G_new, orthonormalised; all of them are kept."""
        left = left @ self.weights
        blocks = []
        for index, (block, dtype) in enumerate(zip(self.blocks, self.dtypes, strict=True)):
            row = as_matrix(rows.block(index))
            step = _columns(max(len(left), block.codes.shape[0]))
            parts = [quantised(row.new_empty(len(left), 0))]  # all of a parameter without numbers
            for low in range(0, row.shape[1], step):
                part = slice(low, low + step)
                values = mixed(right, row[:, part])
                if self.rank:
                    old = Quantised(
                        block.codes[:, part],
                        block.scales[:, low // _BLOCK : -(-(low + step) // _BLOCK)],
                    )
                    for inside, numbers in old.chunks(dtype):
                        values[:, inside] += mixed(left, numbers)
                parts.append(quantised(values))
            blocks.append(_joined(parts))
        products = sum(
            (
                _between(block, block, dtype).to(left.device)
                for block, dtype in zip(blocks, self.dtypes, strict=True)
            ),
            torch.zeros(len(left), len(left), dtype=torch.float64, device=left.device),
        )
        return Int8Basis(blocks, whitening(products), self.dtypes), torch.arange(
            len(left), device="cpu"
        )


def quantised(values: Tensor) -> Quantised:
    """Round rows ``(k, n)`` to eight bits, in blocks of 64 columns."""
    rows, columns = values.shape
    count = -(-columns // _BLOCK)
    padded = torch.nn.functional.pad(values, (0, -columns % _BLOCK)).view(rows, count, _BLOCK)
    scales = padded.abs().amax(-1).to(torch.float32) / 127
    codes = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
    return Quantised(
        codes.to(torch.int8).view(rows, count * _BLOCK)[:, :columns].contiguous(), scales
    )


def _joined(parts: Sequence[Quantised]) -> Quantised:
    return Quantised(
        torch.cat([part.codes for part in parts], dim=1),
        torch.cat([part.scales for part in parts], dim=1),
    )


def _columns(rank: int) -> int:
    """Columns that are restored at a time: a multiple of the block."""
    return max(1, _TEMPORARY // (max(rank, 1) * _BLOCK)) * _BLOCK


def _between(left: Quantised, right: Quantised, dtype: torch.dtype) -> Tensor:
    """Inner products of the rounded directions of one parameter, float64."""
    total = torch.zeros(
        len(left.codes), len(right.codes), dtype=torch.float64, device=left.codes.device
    )
    if not total.numel():
        return total
    step = _columns(max(total.shape))
    for low in range(0, left.codes.shape[1], step):
        pair = []
        for block in (left, right):
            scales = block.scales[:, low // _BLOCK : -(-(low + step) // _BLOCK)]
            piece = Quantised(block.codes[:, low : low + step], scales)
            pair.append(torch.cat([values for _, values in piece.chunks(dtype)], dim=1))
        total += flat_products(*pair)
    return total
