"""FactoredBasis: directions as combinations of the window's gradients, which are kept factored.

With G the gradients of the w examples of the window, as `safeopt.factored.FactoredRows`,

    U = M·G,        M (k×w),        M (G Gᵀ) Mᵀ = I

so that neither G nor U is ever formed for a linear layer: its inputs a, output gradients b and M
say everything. A refresh adds the new examples' a and b and drops those of the oldest. Old
gradients are therefore the measured ones, times a factor; with fewer directions than examples the
other kinds carry on their projections only.

Memory: the factors, T(d_in + d_out) numbers a layer for T tokens, whatever k. Cost of `coordinates`
and `expand_into`: a forward pass of the window's tokens each, without attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeopt.curvature.basis import whitening
from safeopt.factored import FactoredRows
from safeopt.rows import row_dtype


class FactoredBasis:
    """k orthonormal directions, U = M·G.

    Args:
        rows: G.
        products: G Gᵀ, shape ``(w, w)``, float64.
        mix: M, shape ``(k, w)``, float64.
    """

    kind: ClassVar[str] = "factored"

    def __init__(self, rows: FactoredRows, products: Tensor, mix: Tensor) -> None:
        self.rows = rows
        self.products = products
        self.mix = mix

    @classmethod
    def empty(cls, params: Sequence[Tensor]) -> FactoredBasis:
        """The basis without a direction."""
        none = torch.zeros(0, 0, dtype=torch.float64, device=params[0].device)
        shapes, dtypes = [p.shape for p in params], [row_dtype(p) for p in params]
        devices = [p.device for p in params]
        rows = FactoredRows(shapes, dtypes, [], {}, none[0:0].flatten(), devices)
        return cls(rows, none, none)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], params: Sequence[Tensor]) -> FactoredBasis:
        """The basis of a `state_dict`, on the parameters' devices; its tensors are not copied.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        rows = FactoredRows.from_state(state["rows"], params)
        count = len(rows)
        if state["products"].shape != (count, count) or state["mix"].shape[1:] != (count,):
            raise ValueError(f"its matrices do not fit {count} examples")
        device = params[0].device
        return cls(rows, state["products"].to(device), state["mix"].to(device))

    def state_dict(self) -> dict[str, Any]:
        """The factors, their Gram matrix and M."""
        return {
            "kind": self.kind,
            "rows": self.rows.state_dict(),
            "products": self.products,
            "mix": self.mix,
        }

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return len(self.mix)

    @property
    def nbytes(self) -> int:
        """Bytes that the basis occupies."""
        return self.rows.nbytes + self.products.nbytes + self.mix.nbytes

    def coordinates(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Uᵀv, shape ``(k,)``, float64; None stands for zeros."""
        total = torch.zeros(len(self.rows), dtype=torch.float64, device=self.mix.device)
        if self.rank:
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    total += self.rows.along(index, tensor)
        return self.mix @ total

    @torch.no_grad()
    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place, in their own dtype."""
        if self.rank:
            weights = coordinates.to(self.mix) @ self.mix
            for index, tensor in enumerate(tensors):
                self.rows.add_into(index, tensor, weights)

    def inner(self, other: FactoredBasis) -> Tensor:
        """Inner products with another basis, shape ``(k, k_other)``, float64."""
        return self.mix @ self.rows.inner(other.rows) @ other.mix.T

    def coordinates_of(self, rows: FactoredRows) -> Tensor:
        """Rows in the basis, shape ``(m, k)``, float64."""
        return rows.inner(self.rows) @ self.mix.T

    def window(self, coefficients: Tensor, rows: FactoredRows) -> FactoredWindow:
        """The youngest old gradients, as long as ``coefficients (w, k)`` say, and then new ones."""
        if not len(coefficients):
            return FactoredWindow(rows, rows.products())
        young = range(len(self.rows) - len(coefficients), len(self.rows))
        before = (self.products @ self.mix.T)[young.start :]
        squares = (before * before).sum(1)
        tiny = torch.finfo(squares.dtype).tiny
        scale = torch.where(squares > tiny, (coefficients * before).sum(1) / squares, 1.0)
        old = self.rows.select(young).scaled(scale)
        products = scale.unsqueeze(1) * self.products[young.start :, young.start :] * scale
        between = old.inner(rows)
        above = torch.cat([products, between], dim=1)
        below = torch.cat([between.T, rows.products()], dim=1)
        return FactoredWindow(old.followed_by(rows), torch.cat([above, below]))


class FactoredWindow:
    """The window's gradients G and their Gram matrix."""

    def __init__(self, rows: FactoredRows, products: Tensor) -> None:
        self._rows = rows.compact()
        self._products = products

    def products(self) -> Tensor:
        """The Gram matrix, shape ``(w, w)``, float64."""
        return self._products

    def directions(self, mix: Tensor) -> tuple[FactoredBasis, Tensor]:
        """Directions M·G, orthonormalised; all of them are kept."""
        mix = whitening(mix @ self._products @ mix.T) @ mix
        return FactoredBasis(self._rows, self._products, mix), torch.arange(len(mix), device="cpu")

    def coordinates(self, basis: FactoredBasis) -> Tensor:
        """The gradients in a basis made by `directions`, shape ``(w, k)``, float64."""
        return self._products @ basis.mix.T
