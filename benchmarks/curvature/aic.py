"""The figures of the alignment instability condition: ours and alignment-risk's.

Both compute the top eigenvalues of the empirical Fisher matrix of the safety prompts, the share of
the task's gradient in their eigenspace, ε = ‖F^{1/2} P g‖ and γ = ‖F^{1/2} P H g‖, on the same
prompts and one batch of the task. `alignment-risk` is run with its pipeline's defaults but for what
makes the figures the same: every direction is kept, and H g is not computed again on more batches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.gram import single_examples
from benchmarks.curvature.peers import imported
from benchmarks.curvature.problem import Bench
from benchmarks.curvature.records import AicRow
from benchmarks.curvature.timing import Stopwatch
from benchmarks.tasks import task_loss
from safeopt import SafetyProbe
from safeopt.curvature.operators import HessianOperator
from safeopt.losses import refusal_nll
from safeopt.rows import DenseRows, GradientRows


@dataclass(frozen=True)
class AicPeer:
    """The peer of the AIC figures."""

    name: str = "alignment-risk"
    package: str = "alignment-risk"


AIC_PEER = AicPeer()
OURS = "safeopt"


def measure_aic(bench: Bench, name: str) -> tuple[list[AicRow], dict[str, Any]]:
    """Compute and time the figures.

    Args:
        bench: model and data.
        name: ``"safeopt"`` and ``"alignment-risk"`` for the same adapters, anything else for ours
            over all parameters.

    Raises:
        PeerMissingError: if the peer is not installed.
    """
    whole = name not in (OURS, AIC_PEER.name)
    function = _theirs if name == AIC_PEER.name else _ours
    batch, task = bench.safety_batch(bench.setting.gram_examples), bench.task_batches(1)[0]
    scope: AbstractContextManager[tuple[Any, list[nn.Parameter]]] = (
        bench.everything() if whole else bench.narrow()
    )
    with scope as (model, params):
        if function is _theirs:
            imported("alignment_risk", AIC_PEER.package)
        clock = Stopwatch()
        figures = function(model, params, batch, task, bench.setting.gram_rank)
        time = clock.read()
    size = sum(p.numel() for p in params)
    row = AicRow(implementation=OURS if whole else name, seconds=time.seconds, parameters=size)
    return [row], {"processor_seconds": time.processor_seconds, **figures}


def _ours(
    model: nn.Module,
    params: list[nn.Parameter],
    batch: dict[str, Tensor],
    task: dict[str, Tensor],
    rank: int,
) -> dict[str, Any]:
    """One pass for all prompts, one for the task's gradient, one Hessian-vector product.

    With GGᵀ/m = VΛVᵀ the coordinates of v are Λ^{-1/2}Vᵀ(Gv)/√m: no basis is formed.
    """
    probe = SafetyProbe(model, [batch])
    rows: GradientRows
    if sum(p.numel() for p in params) * len(batch["input_ids"]) > 1 << 28:
        rows = probe.factored(params)[1]
    else:
        rows = DenseRows(probe.per_example(params).rows)
    count = len(rows)
    values, vectors = torch.linalg.eigh(rows.products() / count)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    gradient = [g.detach() for g in torch.autograd.grad(task_loss(model, task), params)]
    hessian = HessianOperator(model, [task], "causal_lm", products="double", params=params)
    bending = hessian.matvec(gradient)

    def coordinates(vector: list[Tensor]) -> Tensor:
        along = torch.stack([rows.along(i, v) for i, v in enumerate(vector)]).sum(0)
        return (vectors.T @ along) / (values * count).sqrt()

    length = sum(float(g.double().square().sum()) for g in gradient) ** 0.5
    inside, bent = coordinates(gradient), coordinates(bending)
    return {
        "eigenvalues": values[:4].tolist(),
        "overlap": float(inside.norm()) / length,
        "epsilon": float((values.sqrt() * inside).norm()),
        "gamma": float((values.sqrt() * bent).norm()),
    }


def _theirs(
    model: nn.Module,
    params: list[nn.Parameter],
    batch: dict[str, Tensor],
    task: dict[str, Tensor],
    rank: int,
) -> dict[str, Any]:
    risk = imported("alignment_risk", AIC_PEER.package)
    device = params[0].device.type
    fisher = imported("alignment_risk.fisher", AIC_PEER.package).FisherConfig(
        top_rank=rank,
        target_explained_variance=None,
        max_samples=len(batch["input_ids"]),
        device=device,
    )
    curvature = imported("alignment_risk.curvature", AIC_PEER.package)
    config = risk.PipelineConfig(
        fisher=fisher,
        curvature=curvature.CurvatureConfig(device=device),
        mode="lora",
        adaptive_curvature_refine=False,
    )
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        report = risk.AlignmentRiskPipeline(config).run(
            model,
            single_examples(batch),
            lambda module, single: refusal_nll(module, single).mean(),
            [task],
            lambda module, given: task_loss(module, given),
        )
    model.zero_grad(set_to_none=True)
    return {
        "eigenvalues": report.subspace.fisher_eigenvalues[:4].tolist(),
        "overlap": report.initial_risk.projected_ratio,
        "epsilon": report.curvature.epsilon_hat,
        "gamma": report.curvature.gamma_hat,
    }
