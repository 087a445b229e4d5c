"""FisherOperator: the Fisher matrix from per-example gradients.

``labels="observed"``: the empirical Fisher, F = (1/W) Σ_i g_i g_iᵀ with g_i = ∇ℓ_i.

``labels="sampled"``: each label is drawn once from the model's own prediction, and the rows are
g_i = Σ_t √w_it ∇NLL_it, with w_it the token's weight in Σ_i ℓ_i. Gradients of different tokens are
then uncorrelated, so that the expectation of F over the draws is the true Fisher matrix, which is
the GGN of `safeopt.curvature.operators.ggn`.

G has one row for each example. Products are F·v = Gᵀ(G·v)/W: once G is there, a product costs
4·m·n operations and no pass through the model. Memory: m_b·n numbers for a micro-batch of m_b
examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt.curvature.operators.base import CurvatureOperator, ParameterFilter
from safeopt.curvature.operators.objective import Loss, row_count
from safeopt.losses import IGNORE, Batch, response_log_probs, token_nll, trimmed
from safeopt.per_example import PerExampleGradients, per_example_gradients
from safeopt.rows import inner_products, mixed, row_dtype


class _Rows:
    """The gradients of a micro-batch's examples."""

    def __init__(self, rows: list[Tensor], weight: float) -> None:
        self.rows = rows
        self.weight = weight

    def add_products(self, vectors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Add Gᵀ(G·v) for each vector."""
        coefficients = inner_products(vectors, self.rows)
        for total, row in zip(out, self.rows, strict=True):
            total += mixed(coefficients, row)


class FisherOperator(CurvatureOperator[_Rows]):
    """The Fisher matrix of the examples, see the module's docstring. Positive semidefinite.

    Args:
        model: see `CurvatureOperator`, likewise the other arguments.
        batches: dicts of tensors.
        loss: the loss; one that gives one number for a batch has no per-example gradients.
        labels: ``"observed"`` for the empirical Fisher matrix, ``"sampled"`` for an unbiased
            estimate of the true one (``"nll"`` and ``"causal_lm"`` only).
        params: which parameters.
        micro_batch_size: examples in one pass.
        keep: micro-batches kept inside `retained`.
        seed: seed of the sampled labels.

    Raises:
        ValueError: also if ``labels`` is unknown, or sampled for a loss without logits.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = "nll",
        *,
        labels: Literal["observed", "sampled"] = "observed",
        params: ParameterFilter | Sequence[nn.Parameter] | None = None,
        micro_batch_size: int = 16,
        keep: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, batches, loss, params=params, micro_batch_size=micro_batch_size, keep=keep
        )
        if labels not in ("observed", "sampled"):
            raise ValueError(f'labels="{labels}": expected "observed" or "sampled"')
        if labels == "sampled" and not self.objective.is_cross_entropy:
            raise ValueError(
                f'loss={loss!r}: labels can be sampled for "nll" and "causal_lm" only; '
                'use labels="observed"'
            )
        self.labels = labels
        self.seed = seed
        self._looped: set[int] = set()

    def rows(self) -> list[Tensor]:
        """Return G/√W: F is the sum of the outer products of these rows.

        Returns:
            One tensor for each parameter, shape ``(m, *p.shape)``: what `solvers.gram` takes. The
            rows stand as they were run: the shortest of a batch first where padding is avoided, see
            `safeopt.losses.reads_padding`. Memory: m·n numbers.
        """
        with self._looking():
            collected = list(self._all_parts())
        scale = sum(part.weight for part in collected) ** -0.5
        parts = zip(*(part.rows for part in collected), strict=True)
        return [scale * torch.cat(blocks) for blocks in parts]

    def trace(self, products: int = 0, seed: int = 0) -> float:
        """Return the exact trace, (1/W) Σ_i ‖g_i‖², without products; the arguments are ignored."""
        squares, total = 0.0, 0.0
        with self._looking():
            for part in self._all_parts():
                squares += sum(float(x.square().sum(dtype=torch.float64)) for x in part.rows)
                total += part.weight
        return squares / total

    def _part(self, batch: Any, index: int) -> _Rows:
        count = row_count(batch)
        if count is None or not self._splits:
            raise ValueError(
                "loss: per-example gradients need a batch that is a dict of tensors with one row "
                "for each example, and a loss of shape (m,)"
            )
        if not self.objective.has_targets(batch):
            zeros = [
                torch.zeros(count, *p.shape, dtype=row_dtype(p), device=p.device)
                for p in self.params
            ]
            return _Rows(zeros, self.objective.weight(batch, batch["labels"][:, 0]))
        function = self.objective.losses
        if self.labels == "sampled":
            batch = self._with_sampled_labels(batch, index)
            function = self._scaled_losses
        # Layers that put tokens before examples would look like any others in a square batch.
        if count == 1 or all(x.shape[:2] != (count, count) for x in batch.values()):
            losses, rows = self._gradients(function, batch)
        else:
            halves = [{k: x[some] for k, x in batch.items()} for some in (slice(1), slice(1, None))]
            first, rest = (self._gradients(function, half) for half in halves)
            losses = torch.cat([first.losses, rest.losses])
            rows = [torch.cat(pair) for pair in zip(first.rows, rest.rows, strict=True)]
        return _Rows(rows, self.objective.weight(batch, losses))

    def _gradients(
        self, function: Callable[[nn.Module, Any], Tensor], batch: dict[str, Tensor]
    ) -> PerExampleGradients:
        """The gradients of one pass's examples."""
        count = len(next(iter(batch.values())))
        singles: list[Batch] = [{k: x[i : i + 1] for k, x in batch.items()} for i in range(count)]
        if self.objective.is_cross_entropy:
            singles = [trimmed(single) for single in singles]
        result = per_example_gradients(
            partial(function, self.model, batch if count > 1 else singles[0]),
            [partial(function, self.model, single) for single in singles],
            self.model,
            self.params,
            self._looped,
        )
        passes = 1 + (count if self._looped else 0)
        self.counts.forward += passes
        self.counts.backward += passes
        return result

    @torch.no_grad()
    def _with_sampled_labels(self, batch: Any, index: int) -> Any:
        # A seed for each micro-batch: the same labels at every product, kept or not.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * index)
        self.counts.forward += 1
        log_probs, targets = response_log_probs(self.model, batch)
        probabilities = log_probs.exp().flatten(0, -2).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator).view(targets.shape)
        labels = batch["labels"].clone()
        length = targets.shape[1]
        drawn = drawn.to(labels.device)
        labels[:, -length:] = torch.where(targets != IGNORE, drawn, IGNORE)
        return {**batch, "labels": labels}

    def _scaled_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Σ_t √w_it NLL_it of each example."""
        log_probs, targets = response_log_probs(model, batch)
        weights = self.objective.token_weights(targets).sqrt().to(log_probs.dtype)
        nll, _ = token_nll(log_probs, targets)
        return (nll * weights).sum(-1)
