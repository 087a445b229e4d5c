"""Operators whose products are taken one vector at a time, by a backend of `products`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from safeopt.curvature.operators.base import CurvatureOperator, ParameterFilter
from safeopt.curvature.operators.objective import Loss
from safeopt.curvature.products import Kind, Product, Site, choose, filled

if TYPE_CHECKING:
    from typing_extensions import Self


class Weighed(Protocol):
    """Something with a share of W, which may be known only after its first use."""

    weight: float


@dataclass
class _Share:
    """A share of W that is known."""

    weight: float


class ProductPart:
    """A micro-batch whose products are taken one vector at a time."""

    def __init__(self, product: Product, source: Weighed) -> None:
        self._product = product
        self._source = source

    @property
    def weight(self) -> float:
        """The micro-batch's share of W, after the first product."""
        return self._source.weight

    def add_products(self, vectors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Add this micro-batch's unnormalised products with ``vectors`` to ``out``."""
        for j in range(vectors[0].shape[0]):
            parts = self._product([x[j] for x in vectors])
            for total, part in zip(out, parts, strict=True):
                total[j] += part


class VectorwiseOperator(CurvatureOperator[ProductPart]):
    """An operator whose products are taken by one of the backends of `products`.

    Args:
        model: see `CurvatureOperator`, likewise the other arguments.
        batches: the data.
        loss: the loss.
        products: the backend; ``"auto"`` tries them on two examples at the first product.
        params: which parameters.
        micro_batch_size: examples in one pass.
        keep: micro-batches kept inside `retained`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = "nll",
        *,
        products: Kind | Literal["auto"] = "auto",
        params: ParameterFilter | Sequence[nn.Parameter] | None = None,
        micro_batch_size: int = 16,
        keep: int = 1,
    ) -> None:
        super().__init__(
            model, batches, loss, params=params, micro_batch_size=micro_batch_size, keep=keep
        )
        self.products = products
        self._site = Site(model, self.names, self.params, self.counts)
        self._kind: Kind | None = None

    def chosen_products(self) -> Kind:
        """Return the backend in use; found out at the first call, by a few passes of two examples.

        Raises:
            RuntimeError: if the backend cannot work on this model, with the cause and the cure.
        """
        if self._kind is None:
            examples = self._first_examples(2)
            with self._looking():
                self._kind = choose(
                    self.products, self._site, lambda kind: self._product(kind, examples)[0]
                )
        return self._kind

    def on(self, batches: Iterable[Any]) -> Self:
        """The same operator on other batches: choice of backend and counts are shared."""
        other = copy.copy(self)
        other._batches, other._parts = batches, None
        return other

    def _part(self, batch: Any, index: int) -> ProductPart:
        if not self.objective.has_targets(batch):
            share = _Share(self.objective.weight(batch, batch["labels"][:, 0]))
            return ProductPart(lambda vector: filled([None] * len(vector), self.params), share)
        return ProductPart(*self._product(self.chosen_products(), batch))

    @abstractmethod
    def _product(self, kind: Kind, batch: Any) -> tuple[Product, Weighed]:
        """Return the product of one micro-batch's unnormalised curvature, and who weighs it."""
