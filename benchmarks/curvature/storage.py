"""The kinds of basis: their bytes, and how well they project a task gradient.

`dense` and `int8` are made over adapters, where they are at home, `factored` and `compressed` over
all parameters. The exact projection on the top k directions, Pv = GᵀV_kΣ_k⁻²V_kᵀGv with
GGᵀ = VΣ²Vᵀ, needs no basis: Gv from one pass for each example, Gᵀw as the gradient of the weighted
sum of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curvature.gram import single_examples
from benchmarks.curvature.problem import Bench
from benchmarks.curvature.records import BasisRow
from benchmarks.tasks import task_loss
from safeopt import SafetyProbe
from safeopt.curvature.bases.compressed import CompressedBasis
from safeopt.curvature.basis import Basis
from safeopt.curvature.subspace import updated_subspace
from safeopt.losses import refusal_nll
from safeopt.rows import DenseRows, GradientRows

_FLOAT32 = 4


def over_adapters(bench: Bench) -> tuple[list[BasisRow], dict[str, Any]]:
    """`dense` and `int8` for the adapters."""
    with bench.narrow() as (model, params):
        return _kinds(bench, model, params, ("dense", "int8"))


def over_all_parameters(bench: Bench) -> tuple[list[BasisRow], dict[str, Any]]:
    """`factored` and `compressed` for all parameters."""
    with bench.everything() as (model, params):
        return _kinds(bench, model, params, ("factored", "compressed"))


def _kinds(
    bench: Bench, model: nn.Module, params: list[nn.Parameter], kinds: Sequence[str]
) -> tuple[list[BasisRow], dict[str, Any]]:
    setting = bench.setting
    batch = bench.safety_batch(setting.gram_examples)
    probe = SafetyProbe(model, [batch])
    task = bench.task_batches(1)[0]
    vector = list(torch.autograd.grad(task_loss(model, task), params))
    whole: GradientRows
    if "dense" in kinds:
        losses, blocks = probe.per_example(params)
        whole = DenseRows(blocks)
    else:
        losses, whole = probe.factored(params)
    exact = exact_projection(model, params, batch, whole.products(), setting.gram_rank, vector)
    rows: list[BasisRow] = []
    details: dict[str, dict[str, float]] = {}
    for kind in kinds:
        count = len(losses)
        basis = updated_subspace(
            None,
            params,
            whole,
            losses,
            probe.response_tokens(range(count)),
            torch.full((count,), torch.nan),
            rank=setting.gram_rank,
            window=count,
            kind=kind,
        ).basis
        dense = basis.rank * sum(p.numel() for p in params) * _FLOAT32
        error = projection_error(basis, vector, exact)
        rows.append(
            BasisRow(
                kind=kind, nbytes=basis.nbytes, dense_fp32_nbytes=dense, projection_error=error
            )
        )
        details[kind] = {"directions": basis.rank, "parameters": sum(p.numel() for p in params)}
        if isinstance(basis, CompressedBasis):
            details[kind]["energy_kept"] = basis.energy
            size = sum(p.numel() for p in model.parameters())
            details[kind]["work_per_pass_in_forward_tokens"] = basis.work / size
    return rows, details


def exact_projection(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    batch: dict[str, Tensor],
    products: Tensor,
    rank: int,
    vector: Sequence[Tensor],
) -> list[Tensor]:
    """The projection of a vector on the top directions of the examples' gradients.

    Args:
        model: in evaluation mode.
        params: the parameters.
        batch: the examples.
        products: GGᵀ, shape ``(m, m)``, float64.
        rank: number of directions k.
        vector: v, one tensor for each parameter.
    """
    along = []
    for single in single_examples(batch):
        parts = torch.autograd.grad(refusal_nll(model, single).sum(), list(params))
        along.append(sum(float((g.double() * v).sum()) for g, v in zip(parts, vector, strict=True)))
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values[-rank:], vectors[:, -rank:]
    weights = vectors @ ((vectors.T @ torch.tensor(along).to(products)) / values)
    losses = refusal_nll(model, batch)
    total = (losses * weights.to(losses)).sum()
    return [part.detach() for part in torch.autograd.grad(total, list(params))]


def projection_error(basis: Basis, vector: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖UUᵀv − Pv‖/‖Pv‖."""
    projected = [torch.zeros_like(v) for v in vector]
    basis.expand_into(projected, basis.coordinates(vector))
    gap = sum(float((a - b).double().square().sum()) for a, b in zip(projected, exact, strict=True))
    return float((gap / sum(float(x.double().square().sum()) for x in exact)) ** 0.5)
