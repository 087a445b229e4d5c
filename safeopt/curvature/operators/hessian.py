"""HessianOperator: H = ∇²A(θ)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from safeopt.curvature.operators.objective import Objective
from safeopt.curvature.operators.vectorwise import VectorwiseOperator
from safeopt.curvature.products import Kind, Product, hessian_product


class HessianOperator(VectorwiseOperator):
    """The Hessian H = ∇²A(θ) of A(θ) = (1/W) Σ_i ℓ_i(θ). Symmetric, in general indefinite.

    The arguments are those of `VectorwiseOperator`; the backends and their costs are described in
    `safeopt.curvature.products`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> square = lambda model, x: 0.5 * model(x).square().sum(1)
        >>> hessian = HessianOperator(model, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], square)
        >>> hessian.to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def _product(self, kind: Kind, batch: Any) -> tuple[Product, _Total]:
        total = _Total(self.objective, batch)
        return hessian_product(kind, self._site, total), total


class _Total:
    """The summed loss of a micro-batch as a function of the model."""

    def __init__(self, objective: Objective, batch: Any) -> None:
        self.weight = 0.0
        self._objective = objective
        self._batch = batch

    def __call__(self, model: nn.Module) -> Tensor:
        losses = self._objective.losses(model, self._batch)
        self.weight = self._objective.weight(self._batch, losses)
        return losses.sum()
