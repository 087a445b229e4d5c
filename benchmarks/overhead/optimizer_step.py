"""``optimizer_step_ratio``: `step()` of a protected and a plain AdamW, both with ``foreach=True``.

``elastic_optimizer_step_ratio`` is the same with the pull to the aligned model.

The parameters are those of LoRA with r=8 on all linear layers of 25 layers of SmolLM2's shapes:
350 tensors, 2.04M parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead.subspace import ONE_REFRESH, PULL, RANK, Comparison, fill_subspace
from safeopt import PreconditionedSGD, ProjectedAdamW, SafetyProbe, SafetySAM

PLAIN, PROTECTED, ELASTIC = "AdamW", "ProjectedAdamW", "ProjectedAdamW, elastic"
LAYERS, LORA = 25, 8
# Inputs and outputs of q, k, v, o, gate, up and down.
LINEAR = (
    (576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576),
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [shape for _ in range(LAYERS) for i, o in LINEAR for shape in ((LORA, i), (o, LORA))]


class Adapters(nn.Module):
    """Linear layers of the adapters' shapes; every safety example has a linear loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in SHAPES)
        self.inputs = [torch.randn(RANK + 1, 1, i, device=DEVICE) for _, i in SHAPES]
        self.outputs = [torch.randn(RANK + 1, 1, o, device=DEVICE) for o, _ in SHAPES]
        self.to(DEVICE)

    def forward(self, examples: Tensor) -> Tensor:
        """The losses of the examples named."""
        total = torch.zeros(len(examples), device=DEVICE)
        for layer, a, b in zip(self.layers, self.inputs, self.outputs, strict=True):
            total = total + (layer(a[examples]) * b[examples]).sum((1, 2))
        return total


def steps() -> Comparison:
    """The steps to compare, each on parameters of its own."""
    runs: dict[str, Callable[[], object]] = {}
    size, rank = 0, RANK
    for name, build in {
        PLAIN: lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        PROTECTED: lambda model: ProjectedAdamW(model.parameters(), foreach=True, **_safety(model)),
        ELASTIC: lambda model: ProjectedAdamW(
            model.parameters(), foreach=True, elastic=PULL, **_safety(model)
        ),
        "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "ProjectedAdamW, fused": lambda model: ProjectedAdamW(
            model.parameters(), fused=True, **_safety(model)
        ),
        "SafetySAM, lookahead": lambda model: SafetySAM(
            model.parameters(), lr=1e-3, foreach=True, **_safety(model)
        ),
        "PreconditionedSGD": lambda model: PreconditionedSGD(
            model.parameters(), lr=1e-3, momentum=0.9, foreach=True, **_safety(model)
        ),
    }.items():
        model = Adapters()
        params = list(model.parameters())
        size = sum(p.numel() for p in params)
        optimizer = build(model)
        if hasattr(optimizer, "safety"):
            rank = min(rank, fill_subspace(optimizer, params))
        for p in params:
            p.grad = torch.randn_like(p)
        runs[name] = optimizer.step
    return Comparison(runs, size, rank)


def _safety(model: nn.Module) -> dict[str, Any]:
    ids = torch.arange(RANK + 1, device=DEVICE).view(-1, 1).repeat(1, 2)
    probe = SafetyProbe(
        model,
        [{"input_ids": ids, "labels": ids}],
        loss=lambda module, batch: module(batch["input_ids"][:, 0]),
    )
    return {"probe": probe, "trial_examples": 1, **ONE_REFRESH}
