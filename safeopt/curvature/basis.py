"""The basis U of the safety subspace, and what every way of storing it can do.

A basis holds k orthonormal directions over all protected parameters. All that happens to it is
named by `Basis`, so that the optimizers do not know how it is stored:

- each step: c = Uᵀθ (`coordinates`) and θ += U·δ (`expand_into`);
- each refresh: G = [R U ; G_new], the window's gradients (`window`), their Gram matrix and new
  directions M·G (`WindowRows`).

`DenseBasis` keeps one tensor of shape ``(k, *p.shape)`` for each parameter, so that it can be moved
and sharded with the parameter; `safeopt.curvature.flat` says where they lie. Memory: k numbers for
each protected parameter. The other kinds are in `safeopt.curvature.bases`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from safeopt.curvature.flat import FlatBlocks
from safeopt.distributed import ALONE, Layout, local, locals_of
from safeopt.rows import GradientRows, as_matrix, flat_products, mixed, row_dtype
from safeopt.rows import inner_products as inner_products


class Basis(Protocol):
    """k orthonormal directions in the space of all protected parameters."""

    kind: ClassVar[str]

    @property
    def rank(self) -> int:
        """Number of directions k."""

    @property
    def nbytes(self) -> int:
        """Bytes that the basis occupies."""

    def coordinates(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Uᵀv, shape ``(k,)``, float64; None stands for zeros."""

    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place, in their own dtype."""

    def inner(self, other: Any) -> Tensor:
        """Inner products with a basis of the same kind, shape ``(k, k_other)``, float64."""

    def coordinates_of(self, rows: Any) -> Tensor:
        """Rows in the basis, shape ``(m, k)``, float64."""

    def window(self, coefficients: Tensor, rows: Any) -> WindowRows:
        """Old gradients in this basis, ``coefficients (w, k)``, followed by new ones."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the tensors are the basis's own, not copies."""


class WindowRows(Protocol):
    """The gradients of a window of examples, from which new directions are made."""

    def products(self) -> Tensor:
        """Their Gram matrix, shape ``(w, w)``, float64."""

    def directions(self, mix: Tensor) -> tuple[Basis, Tensor]:
        """Directions M·G for ``mix (k, w)``, orthonormalised, and which of them were kept."""

    def coordinates(self, basis: Any) -> Tensor:
        """The gradients in a basis made by `directions`, shape ``(w, k)``, float64."""


class UpdatableBasis(Basis, Protocol):
    """A basis whose successor is made of itself and of new gradients."""

    def updated(self, left: Tensor, right: Tensor, rows: Any) -> tuple[Basis, Tensor]:
        """Directions left·U + right·G_new, orthonormalised, and which of them were kept."""


class CarriedRows:
    """[R U ; G_new]: old gradients by their coefficients in the old basis, new ones as they are.

    Args:
        basis: U, orthonormal.
        coefficients: R, shape ``(w, k)``.
        rows: G_new.
    """

    def __init__(self, basis: UpdatableBasis, coefficients: Tensor, rows: GradientRows) -> None:
        self._basis = basis
        self._coefficients = coefficients
        self._rows = rows

    def products(self) -> Tensor:
        """Their Gram matrix; UᵀU = I saves that of the old ones."""
        old = self._coefficients
        between = old @ self._basis.coordinates_of(self._rows).T
        above = torch.cat([old @ old.T, between], dim=1)
        return torch.cat([above, torch.cat([between.T, self._rows.products()], dim=1)])

    def directions(self, mix: Tensor) -> tuple[Basis, Tensor]:
        """Directions M·G for ``mix (k, w)``, orthonormalised, and which of them were kept."""
        old = len(self._coefficients)
        return self._basis.updated(mix[:, :old] @ self._coefficients, mix[:, old:], self._rows)

    def coordinates(self, basis: Basis) -> Tensor:
        """The gradients in a basis, shape ``(w, k)``, float64."""
        old = self._coefficients @ self._basis.inner(basis)
        return torch.cat([old, basis.coordinates_of(self._rows)])


class DenseBasis:
    """k orthonormal directions in the space of all protected parameters.

    Args:
        blocks: one tensor for each parameter, shape ``(k, *p.shape)``, float32 or float64; together
            their rows are orthonormal.
        layout: how the parameters lie over the processes; the blocks are this process's parts.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, blocks: Sequence[Tensor], layout: Layout = ALONE) -> None:
        self._flat = FlatBlocks(blocks)
        self.layout = layout

    @property
    def blocks(self) -> list[Tensor]:
        """One tensor for each parameter, shape ``(k, *p.shape)``; views of larger ones."""
        return self._flat.blocks

    @classmethod
    def empty(cls, params: Sequence[Tensor], layout: Layout = ALONE) -> DenseBasis:
        """The basis without a direction."""
        parts = [local(p).detach() for p in params]
        return cls([p.new_empty((0, *p.shape), dtype=row_dtype(p)) for p in parts], layout)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], params: Sequence[Tensor], layout: Layout = ALONE
    ) -> DenseBasis:
        """The basis of a `state_dict`, on the parameters' devices; its tensors are copied.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        blocks = state["blocks"]
        rank = blocks[0].shape[0] if len(blocks) else 0
        parts = [local(p).detach() for p in params]
        if [tuple(block.shape) for block in blocks] != [(rank, *p.shape) for p in parts]:
            raise ValueError(
                f"its shapes do not fit the parameters ({len(blocks)} blocks of rank {rank} for "
                f"{len(params)} parameters)"
            )
        return cls([block.to(p.device) for block, p in zip(blocks, params, strict=True)], layout)

    def state_dict(self) -> dict[str, Any]:
        """Its blocks."""
        return {"kind": self.kind, "blocks": self.blocks}

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
        return self.coordinates_together([tensors])[0]

    @torch.no_grad()
    def coordinates_together(self, vectors: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """`coordinates` of several vectors, shape ``(l, k)``: one reading of U, one all-reduce."""
        return self.layout.sum(self._flat.products([locals_of(v) for v in vectors]))

    @torch.no_grad()
    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place: θ += U(c⁺ − c).

        Args:
            tensors: one for each parameter; changed in place in their own dtype.
            coordinates: shape ``(k,)``.
        """
        self._flat.add_into([t for t in locals_of(tensors) if t is not None], coordinates)
        self.layout.publish()

    def inner(self, other: DenseBasis) -> Tensor:
        """Return UᵀW, the inner products with another basis; shape ``(k, k_other)``, float64."""
        mine, theirs = self._flat.segments, other._flat.segments
        return self.layout.sum(inner_products([m.matrix for m in mine], [t.matrix for t in theirs]))

    def coordinates_of(self, rows: GradientRows) -> Tensor:
        """Rows in the basis, shape ``(m, k)``, float64."""
        total = torch.zeros(len(rows), self.rank, dtype=torch.float64, device=self.blocks[0].device)
        for index, block in enumerate(self.blocks):
            if block.numel():
                part = flat_products(as_matrix(rows.block(index)), as_matrix(block))
                total += part.to(total.device)
        return self.layout.sum(total)

    def window(self, coefficients: Tensor, rows: GradientRows) -> CarriedRows:
        """Old gradients in this basis, ``coefficients (w, k)``, followed by new ones."""
        return CarriedRows(self, coefficients, rows)

    def updated(self, left: Tensor, right: Tensor, rows: GradientRows) -> tuple[DenseBasis, Tensor]:
        """Directions left·U + right·G_new, orthonormalised; all of them are kept."""
        basis = DenseBasis(
            [
                mixed(left, block) + mixed(right, rows.block(index))
                for index, block in enumerate(self.blocks)
            ],
            self.layout,
        )
        correction = whitening(basis.inner(basis))
        for segment in basis._flat.segments:
            segment.matrix.copy_(mixed(correction, segment.matrix))
        return basis, torch.arange(len(left), device="cpu")

    def rows(self, scale: Tensor) -> list[Tensor]:
        """Return the directions times ``scale (k,)``: rows whose Gram matrix is diag(scale²)."""
        return [block * scale.to(block).view(-1, *[1] * (block.dim() - 1)) for block in self.blocks]


def coordinates_together(basis: Basis, *vectors: Sequence[Tensor | None]) -> Tensor:
    """`Basis.coordinates` of several vectors, shape ``(l, k)``; a dense basis is read once."""
    if isinstance(basis, DenseBasis):
        return basis.coordinates_together(vectors)
    return torch.stack([basis.coordinates(vector) for vector in vectors])


def whitening(products: Tensor) -> Tensor:
    """The matrix W that makes nearly orthonormal directions orthonormal: W·products·Wᵀ = I."""
    if not len(products):
        return products
    return torch.linalg.inv(torch.linalg.cholesky(products))
