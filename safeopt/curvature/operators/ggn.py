"""GGNOperator: the generalised Gauss-Newton matrix of a next-token cross-entropy.

With z_it the log-probabilities (or logits, which differ by a constant) of token t of example i, p
their softmax, w_it the token's weight in Σ_i ℓ_i and J_it = ∂z_it/∂θ,

    GGN = (1/W) Σ_it w_it J_itᵀ (diag(p_it) − p_it p_itᵀ) J_it.

The middle factor is applied in closed form, t ↦ p ⊙ (t − ⟨p, t⟩): no Jacobian of vocabulary size
and no second derivative of the loss is formed. The matrix is positive semidefinite, equals the
Fisher matrix of the model's own predictions, and is the same for a KL divergence to a fixed
reference, whose second derivative with respect to the logits does not depend on that reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt.curvature.jacobian import gauss_newton_product
from safeopt.curvature.operators.base import ParameterFilter
from safeopt.curvature.operators.objective import Loss, Objective
from safeopt.curvature.operators.vectorwise import VectorwiseOperator
from safeopt.curvature.products import Kind, Product
from safeopt.losses import response_log_probs


class GGNOperator(VectorwiseOperator):
    """The generalised Gauss-Newton matrix of a cross-entropy, see the module's docstring.

    Args:
        model: see `VectorwiseOperator`, likewise the other arguments.
        batches: dicts of tensors with labels.
        loss: ``"nll"``, ``"causal_lm"``, or a `safeopt.losses.ReferenceKL`.
        products: the backend.
        params: which parameters.
        micro_batch_size: examples in one pass.
        keep: micro-batches kept inside `retained`.

    Raises:
        ValueError: also if ``loss`` is no next-token cross-entropy.
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
            model, batches, loss, products=products, params=params,
            micro_batch_size=micro_batch_size, keep=keep,
        )  # fmt: skip
        if not self.objective.is_cross_entropy:
            raise ValueError(
                f"loss={loss!r}: the closed form needs the logits of a next-token cross-entropy; "
                'give "nll", "causal_lm" or a ReferenceKL, or use HessianOperator'
            )

    def _product(self, kind: Kind, batch: Any) -> tuple[Product, _Predictions]:
        predictions = _Predictions(self.objective, batch)
        product = gauss_newton_product(kind, self._site, predictions, predictions.metric)
        return product, predictions


class _Predictions:
    """Log-probabilities of a micro-batch and the curvature of the loss with respect to them."""

    def __init__(self, objective: Objective, batch: Any) -> None:
        self.weight = 0.0
        self._objective = objective
        self._batch = batch
        self._token_weights = torch.empty(0, device="cpu")

    def __call__(self, model: nn.Module) -> Tensor:
        log_probs, targets = response_log_probs(model, self._batch)
        weights = self._objective.token_weights(targets)
        self._token_weights = weights.to(log_probs.dtype).unsqueeze(-1)
        self.weight = self._objective.weight(self._batch, targets[:, 0])
        return log_probs

    def metric(self, z: Tensor, tangent: Tensor) -> Tensor:
        p = z.softmax(-1)
        inner = (p * tangent).sum(-1, keepdim=True)
        return self._token_weights * p * (tangent - inner)
