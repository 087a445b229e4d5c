"""`diagnose`: is this model unstable under this task? Before the first step of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from safeopt.curvature.operators import HessianOperator
from safeopt.curvature.operators.base import ParameterFilter
from safeopt.curvature.operators.objective import Loss
from safeopt.diagnostics.conditions import (
    Condition,
    Figures,
    Thresholds,
    figures,
    intervals,
    judge,
)
from safeopt.diagnostics.layers import LayerShare, layer_shares
from safeopt.diagnostics.measure import Evidence, Listener, measure
from safeopt.diagnostics.spectrum import Spectrum
from safeopt.diagnostics.verdict import Verdict, verdict
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

SCHEMA = "safeopt.aic/1"
_RANK = 16


@dataclass(frozen=True)
class Diagnosis:
    """The Alignment Instability Condition of a model under a task.

    Attributes:
        conditions: low-rank sensitivity, initial orthogonality, curvature coupling.
        figures: all figures behind them, see `Figures`.
        intervals: their 95% intervals, by name.
        rank: k, the number of directions.
        eigenvalues: of the safety curvature, largest first; at most one for each safety example.
        layers: which modules carry the curvature.
        verdict: what follows, in words.
        evidence: the inner products from which all this was computed.
        thresholds: with which the figures were compared.
    """

    conditions: tuple[Condition, Condition, Condition]
    figures: Figures
    intervals: dict[str, tuple[float, float]]
    rank: int
    eigenvalues: list[float]
    layers: list[LayerShare]
    verdict: Verdict
    evidence: Evidence
    thresholds: Thresholds

    @property
    def angle(self) -> float:
        """Angle of the task gradient to the safety subspace, in radians; π/2 is a right angle."""
        return float(
            torch.tensor(self.figures.overlap, dtype=torch.float64, device="cpu")
            .clamp(max=1)
            .acos()
        )

    @property
    def update_angle(self) -> float:
        """The same for Adam's first update."""
        overlap = torch.tensor(self.figures.update_overlap, dtype=torch.float64, device="cpu")
        return float(overlap.clamp(max=1).acos())

    def as_json(self) -> dict[str, Any]:
        """What ``aic.json`` holds: plain numbers, lists and texts.

        The schema is named in ``schema``; a change that readers must know of changes its number.
        """
        return {
            "schema": SCHEMA,
            "conditions": [asdict(condition) for condition in self.conditions],
            "figures": {
                name: {"value": value, "interval": list(self.intervals[name])}
                for name, value in asdict(self.figures).items()
            },
            "angle": self.angle,
            "update_angle": self.update_angle,
            "rank": self.rank,
            "parameters": self.evidence.size,
            "safety_examples": len(self.evidence.safety_losses),
            "task_batches": len(self.evidence.task_losses),
            "alignment_loss": float(self.evidence.safety_losses.mean()),
            "task_loss": float(self.evidence.weights @ self.evidence.task_losses),
            "top_eigenvalues": self.eigenvalues[: self.rank],
            "tail_eigenvalues": self.eigenvalues[self.rank :],
            "layers": [asdict(layer) for layer in self.layers],
            "blind_parameters": len(self.evidence.blind),
            "thresholds": asdict(self.thresholds),
            "verdict": self.verdict.text,
            "risk": self.verdict.risk,
            "notes": list(self.verdict.notes),
            "products": self.evidence.products,
            "passes": self.evidence.passes,
        }


def diagnose(
    probe: SafetyProbe,
    task: Sequence[Any],
    *,
    params: ParameterFilter | Sequence[nn.Parameter] | None = None,
    rank: int | None = None,
    examples: int = 32,
    task_loss: Loss = "causal_lm",
    thresholds: Thresholds | None = None,
    seed: int = 0,
    listener: Listener = lambda stage, done, total: None,
) -> Diagnosis:
    """Check the Alignment Instability Condition of a model under a fine-tuning task.

    The model, its gradients, random state and modes are left as they are.

    Args:
        probe: the safety examples; its model is diagnosed as it stands.
        task: training batches, each as the optimizer will see it: Adam's first update depends on
            the batch. Two at least, so that there is an interval.
        params: which trainable parameters will be trained: a test of their names, the parameters
            themselves, or None for all.
        rank: k, directions of the safety subspace; by default 16, or half of the safety examples
            where that is less.
        examples: safety examples to use, at most; drawn from the probe by ``seed``.
        task_loss: ``"causal_lm"`` or a function, see `safeopt.curvature.operators.objective`.
        thresholds: where the conditions begin to hold; the defaults are `Thresholds`'s.
        seed: of the examples' draw.
        listener: called with what is being done, the passes done and those to do.

    Returns:
        Figures, intervals and a verdict.

    Raises:
        TypeError: if ``task`` is no list of batches.
        ValueError: if a number is out of its range, ``rank`` is no smaller than the number of
            safety examples, there are fewer than two task batches, no parameter is trained, the
            safety gradients vanish, so that there is no curvature to look at, or a task batch has a
            loss, gradient or product that is not finite.

    Cost: one forward and one backward pass over the safety examples; for each of B task batches one
    gradient and B Hessian-vector products, which share a graph. No basis is formed. Memory: see
    `safeopt.diagnostics.measure`.
    """
    if not isinstance(task, Sequence) or isinstance(task, (str, bytes)):
        raise TypeError(
            f"task={type(task).__name__}: expected a list of training batches; of a loader the "
            "first four do, list(itertools.islice(loader, 4))"
        )
    if len(task) < 2:
        raise ValueError(f"task: {len(task)} batch(es); an interval needs at least two")
    if examples < 2:
        raise ValueError(f"examples={examples}: a spectrum needs at least two safety examples")
    chosen = HessianOperator(probe.model, list(task), task_loss, params=params)
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        torch.randperm(len(probe), generator=generator, device="cpu")[:examples]
        .sort()
        .values.tolist()
    )
    k = min(_RANK, len(drawn) // 2) if rank is None else rank
    if not 1 <= k < len(drawn):
        raise ValueError(
            f"rank={k}: expected at least 1 and fewer than the {len(drawn)} safety examples, whose "
            "gradients span no more directions"
        )
    evidence = measure(
        probe, task, chosen.params, chosen.names,
        task_loss=task_loss, examples=drawn, listener=listener,
    )  # fmt: skip
    point = figures(evidence, k)
    spread = intervals(evidence, k, point)
    bounds = thresholds or Thresholds()
    conditions = judge(evidence, k, point, spread, bounds)
    result = Diagnosis(
        conditions=conditions,
        figures=point,
        intervals=spread,
        rank=k,
        eigenvalues=Spectrum.of(evidence.gram).eigenvalues.tolist(),
        layers=layer_shares(evidence, k),
        verdict=verdict(conditions, point, evidence, k, bounds),
        evidence=evidence,
        thresholds=bounds,
    )
    logger.info("diagnosis: %s", result.verdict.text)
    return result
