"""The passes behind a diagnosis, and what is kept of them: inner products with safety gradients.

Let G be the gradients of m safety examples (m×n), g_b the task's gradient on batch b and ḡ their
mean. All figures of the Alignment Instability Condition follow from GGᵀ and from G·v for a few
vectors v, so that neither the basis U nor a projected vector is ever formed:

| passes | give |
|---|---|
| one forward and one backward pass over the safety examples | G, for each parameter GGᵀ |
| the same over each task batch | g_b, and Adam's first update u_b = g_b/(abs(g_b) + 1e-8) |
| B Hessian-vector products with each batch, on one graph | H_b g_c |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.curvature.operators import HessianOperator
from safeopt.curvature.operators.objective import Loss, Objective, to_device
from safeopt.isolation import untouched
from safeopt.losses import ReferenceKL
from safeopt.probe import SafetyProbe
from safeopt.rows import DenseRows, GradientRows, inner_products, row_dtype

Listener = Callable[[str, int, int], None]
"""Called with what is being done, the passes done and those to do."""

# torch.optim.Adam's default: it decides what happens to gradients as small as this.
_ADAM_EPS = 1e-8
# A KL divergence of so many units in the last place of 1 is none.
_ROUNDING = 16
# Beyond this many bytes the safety gradients are kept as the factors they are made of.
_DENSE_BYTES = 1 << 30


@dataclass(frozen=True)
class Evidence:
    """What the passes found. m safety examples, B task batches, P parameters; all float64.

    Attributes:
        names: the parameters' names.
        sizes: their numbers of entries.
        grams: GGᵀ of each parameter alone, shape ``(P, m, m)``.
        safety_losses: ℓ_i, shape ``(m,)``.
        response_tokens: of each safety example, see `SafetyProbe.response_tokens`.
        weights: of the task batches in the mean, shape ``(B,)``; they sum to 1.
        task_losses: shape ``(B,)``.
        gradient: G·g_b, shape ``(m, B)``.
        gradient_products: ⟨g_b, g_c⟩, shape ``(B, B)``.
        gradient_energy: ‖ḡ‖² of each parameter, shape ``(P,)``.
        update: G·u_b, shape ``(m, B)``.
        update_norms: ‖u_b‖, shape ``(B,)``.
        bending: G·H_b g_c, shape ``(m, B, B)``.
        bending_norm: ‖Hḡ‖.
        products: the backend of the Hessian-vector products.
        passes: forward and backward passes made, by kind.
    """

    names: list[str]
    sizes: list[int]
    grams: Tensor
    safety_losses: Tensor
    response_tokens: Tensor
    weights: Tensor
    task_losses: Tensor
    gradient: Tensor
    gradient_products: Tensor
    gradient_energy: Tensor
    update: Tensor
    update_norms: Tensor
    bending: Tensor
    bending_norm: float
    products: str
    passes: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of parameters n."""
        return sum(self.sizes)

    @property
    def gram(self) -> Tensor:
        """GGᵀ over all parameters, shape ``(m, m)``."""
        return self.grams.sum(0)

    @property
    def blind(self) -> list[str]:
        """Parameters for which every safety gradient is exactly zero, as for A where LoRA's B = 0.

        Neither their curvature nor what the task does to them is part of any figure.
        """
        dark = self.grams.diagonal(dim1=1, dim2=2).sum(1) == 0
        return [name for name, is_dark in zip(self.names, dark.tolist(), strict=True) if is_dark]


def measure(
    probe: SafetyProbe,
    task: Sequence[Any],
    params: Sequence[nn.Parameter],
    names: Sequence[str],
    *,
    task_loss: Loss,
    examples: Sequence[int],
    listener: Listener,
) -> Evidence:
    """Run the passes.

    Args:
        probe: the safety examples and the model.
        task: training batches.
        params: the parameters that are trained.
        names: their names.
        task_loss: see `safeopt.curvature.operators.objective`.
        examples: indices of the safety examples.
        listener: told about progress.

    Returns:
        The evidence. Memory: m·n numbers, or the factors of `safeopt.factored` where these are more
        than 1 GiB, and 2·B·n numbers of task gradients and their Hessian-vector products.

    Raises:
        TypeError: if the parameters are sharded.
        ValueError: if the safety gradients vanish, or a task batch's loss, gradient or
            Hessian-vector products are not finite.
    """
    probe.layout(params).require_whole("diagnose")
    total = 2 * len(task) + 2
    before = probe.passes.forward, probe.passes.backward
    listener("safety gradients", 0, total)
    losses, rows = _safety_rows(probe, params, examples)
    grams = torch.stack([rows.products_of(i).cpu() for i in range(len(params))])
    _require_curvature(probe, losses, grams)
    passes = {
        "safety_forward": probe.passes.forward - before[0],
        "safety_backward": probe.passes.backward - before[1],
        "task_forward": len(task),
        "task_backward": len(task),
    }
    objective = Objective(task_loss)
    gradients, inside, updates, update_norms, weights, task_losses = [], [], [], [], [], []
    for index, batch in enumerate(task):
        listener("task gradients", 1 + index, total)
        value, weight, gradient = _gradient(probe.model, objective, batch, params)
        _require_finite("loss and gradient", index, value + _norm(gradient))
        gradients.append(gradient)
        inside.append(along(rows, gradient))
        weights.append(weight)
        task_losses.append(value)
        update = first_adam_update(gradient)
        updates.append(along(rows, update))
        update_norms.append(_norm(update))
    shares = torch.tensor(weights, dtype=torch.float64, device="cpu") / sum(weights)
    stacked = [torch.stack(parts) for parts in zip(*gradients, strict=True)]
    gradients.clear()
    bent, total_bending = [], [torch.zeros_like(part[0]) for part in stacked]
    operator = HessianOperator(probe.model, task[:1], task_loss, params=params)
    for index, batch in enumerate(task):
        listener("Hessian-vector products", 1 + len(task) + index, total)
        kind = operator.chosen_products()  # found out once, on the first batch
        products = operator.on([batch]).matmat(stacked)
        for sum_of, part in zip(total_bending, products, strict=True):
            sum_of += float(shares[index]) * torch.tensordot(shares.to(part), part, dims=1)
        _require_finite("Hessian-vector products", index, _norm(products))
        bent.append(torch.stack([along(rows, v) for v in zip(*products, strict=True)], dim=1))
    counts = operator.counts
    passes["task_forward"] += counts.forward
    passes["task_backward"] += counts.backward + counts.double_backward
    listener("figures", total - 1, total)
    return Evidence(
        names=list(names),
        sizes=[p.numel() for p in params],
        grams=grams,
        safety_losses=losses.double().cpu(),
        response_tokens=probe.response_tokens(examples),
        weights=shares,
        task_losses=torch.tensor(task_losses, dtype=torch.float64, device="cpu"),
        gradient=torch.stack(inside, dim=1),
        gradient_products=inner_products(stacked, stacked).cpu(),
        gradient_energy=torch.tensor(
            [_norm([torch.tensordot(shares.to(part), part, dims=1)]) ** 2 for part in stacked],
            dtype=torch.float64,
            device="cpu",
        ),
        update=torch.stack(updates, dim=1),
        update_norms=torch.tensor(update_norms, dtype=torch.float64, device="cpu"),
        bending=torch.stack(bent, dim=1),
        bending_norm=_norm(total_bending),
        products=kind,
        passes=passes,
    )


def _require_curvature(probe: SafetyProbe, losses: Tensor, grams: Tensor) -> None:
    """Refuse safety gradients that are nothing, or rounding, before the task's passes."""
    trace = float(grams.diagonal(dim1=1, dim2=2).sum())
    # The KL divergence is flat at its reference; what is left of its gradient there is rounding.
    rounding = _ROUNDING * torch.finfo(losses.dtype).eps
    still = isinstance(probe.loss, ReferenceKL) and float(losses.abs().max()) <= rounding
    if still or not 0 < trace < math.inf:
        raise ValueError(
            "probe: every safety gradient is zero (or not finite), so there is no safety curvature "
            'to look at; a probe with loss="kl" has none at its own reference: use loss="nll"'
        )


def _require_finite(what: str, index: int, size: float) -> None:
    """Refuse a task batch of whose figures none would be a number, or one would look harmless."""
    if not math.isfinite(size):
        raise ValueError(
            f"task: batch {index} has no finite {what}; leave it out, or compute in float32"
        )


def first_adam_update(gradient: Sequence[Tensor]) -> list[Tensor]:
    """Adam's first step per unit of learning rate: g/(|g| + ε), the sign where g is not tiny."""
    return [g / (g.abs() + _ADAM_EPS) for g in gradient]


def along(rows: GradientRows, vector: Sequence[Tensor]) -> Tensor:
    """G·v, shape ``(m,)``, float64, on the CPU."""
    parts = [rows.along(index, part).cpu() for index, part in enumerate(vector)]
    return torch.stack(parts).sum(0)


def _safety_rows(
    probe: SafetyProbe, params: Sequence[Tensor], examples: Sequence[int]
) -> tuple[Tensor, GradientRows]:
    if len(examples) * sum(p.numel() * row_dtype(p).itemsize for p in params) > _DENSE_BYTES:
        return probe.factored(params, examples)
    losses, rows = probe.per_example(params, examples)
    return losses, DenseRows(rows)


def _gradient(
    model: nn.Module, objective: Objective, batch: Any, params: Sequence[Tensor]
) -> tuple[float, float, list[Tensor]]:
    """Mean loss of a batch, its weight among the batches, and the loss's gradient."""
    with untouched(model), torch.enable_grad():
        batch = to_device(batch, params[0].device)
        losses = objective.losses(model, batch)
        weight = objective.weight(batch, losses)
        loss = losses.sum() / weight
        parts = torch.autograd.grad(loss, list(params), allow_unused=True)
    gradient = [
        torch.zeros_like(p, dtype=row_dtype(p)) if part is None else part.to(row_dtype(p))
        for part, p in zip(parts, params, strict=True)
    ]
    return float(loss.detach()), weight, gradient


def _norm(vector: Sequence[Tensor]) -> float:
    squares = [part.square().sum(dtype=torch.float64).cpu() for part in vector]
    return float(torch.stack(squares).sum().sqrt())
