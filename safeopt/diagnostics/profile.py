"""The curvature profile of a finished run: what fine-tuning did to the safety curvature.

A profile compares the aligned model with the fine-tuned one on the weights that training changed:
for LoRA the weights under the adapters, whose change is ΔW = scale·B·A, so that the start B = 0
does not hide half of it. Its JSON form is versioned: ``schemas/profile-1.schema.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.diagnostics.layers import module_name
from safeopt.diagnostics.overlap import OverlapScore, overlap_scores
from safeopt.diagnostics.scaling_law import fit_onset
from safeopt.diagnostics.spectrum import Spectrum
from safeopt.probe import SafetyProbe
from safeopt.rows import GradientRows

SCHEMA = "safeopt.profile/1"


@dataclass
class Change:
    """A model before and after fine-tuning.

    Attributes:
        before: the aligned model.
        after: the fine-tuned one; may be the same module with its adapters switched on.
        names: of the weights that training changed.
        weights_before: these weights in ``before``, with ``requires_grad``.
        weights_after: likewise in ``after``.
        changes: ΔW of each.
        without: makes a context in which ``before`` computes as before fine-tuning.
    """

    before: nn.Module
    after: nn.Module
    names: list[str]
    weights_before: list[nn.Parameter]
    weights_after: list[nn.Parameter]
    changes: list[Tensor]
    without: Callable[[], AbstractContextManager[Any]]

    @property
    def aligned(self) -> AbstractContextManager[Any]:
        """A context in which ``before`` computes as before fine-tuning; a new one each time."""
        return self.without()


def adapter_change(model: Any) -> Change:
    """The change that a PEFT model's LoRA adapters make to the weights under them.

    The weights are made trainable, everything else is frozen.

    Raises:
        ValueError: if the model has no active LoRA layer, or an adapter's change is not scale·B·A,
            as with DoRA; the model is then as it was.
    """
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any, list[str]]] = [
        (name, module, active)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(getattr(module, "weight", None), Tensor)
        # Adapters may differ in the modules that they adapt.
        if (active := [adapter for adapter in module.active_adapters if adapter in module.scaling])
    ]
    if not found:
        raise ValueError("model: it has no LoRA layer; give a PeftModel with LoRA adapters")
    for name, module, active in found:
        variants = getattr(module, "lora_variant", {})  # new in peft 0.16
        other = [x for x in active if x in variants or getattr(module, "use_dora", {}).get(x)]
        if other:
            raise ValueError(
                f'model: the change of adapter "{other[0]}" of {name} is not scale·B·A (DoRA or '
                "another variant); expected plain LoRA"
            )
    model.requires_grad_(False)
    names, weights, changes = [], [], []
    for name, module, active in found:
        weight = module.get_base_layer().weight
        weight.requires_grad_(True)
        names.append(f"{name}.weight")
        weights.append(weight)
        parts = [module.get_delta_weight(adapter) for adapter in active]
        changes.append(torch.stack(parts).sum(0).detach())
    return Change(model, model, names, weights, weights, changes, model.disable_adapter)


def full_change(before: nn.Module, after: nn.Module) -> Change:
    """The change of all parameters between two models of one architecture.

    Raises:
        ValueError: if the parameters differ in name or shape.
    """
    start, end = dict(before.named_parameters()), dict(after.named_parameters())
    if {k: p.shape for k, p in start.items()} != {k: p.shape for k, p in end.items()}:
        raise ValueError("after: its parameters are not those of the model before fine-tuning")
    for parameter in (*start.values(), *end.values()):
        parameter.requires_grad_(True)
    changes = [(end[name] - p).detach() for name, p in start.items()]
    return Change(
        before, after, list(start), list(start.values()), [end[n] for n in start], changes,
        nullcontext,
    )  # fmt: skip


def curvature_profile(
    change: Change,
    batches: Sequence[Any],
    run: dict[str, Any],
    *,
    rank: int = 16,
    modes: int = 8,
) -> dict[str, Any]:
    """Profile a finished run.

    Args:
        change: the model before and after.
        batches: safety batches, at least two examples.
        run: what ``run.json`` holds, see `safeopt.finetuning.run`.
        rank: k, directions of the safety subspace; at most half of the examples are used.
        modes: r, singular vectors for the figures of arXiv 2505.14185.

    Returns:
        The profile as plain data, see the schema.

    Raises:
        ValueError: if there are fewer than two safety examples or a number is smaller than 1.

    Cost: one forward and one backward pass over the safety examples before, and one after.
    """
    with change.aligned:
        before = SafetyProbe(change.before, batches)
        if len(before) < 2:
            raise ValueError("batches: one safety example; a spectrum needs at least two")
        k = min(rank, len(before) // 2)
        losses_before, rows = before.factored(change.weights_before)
        start = _curvature(rows, change.names, k)
        scores = overlap_scores(rows, change.names, change.changes, rank=k, modes=modes)
    after = SafetyProbe(change.after, batches)
    losses_after, rows_after = after.factored(change.weights_after)
    config = run["config"]
    log = [entry["loss"] for entry in run["log"] if "loss" in entry]
    return {
        "schema": SCHEMA,
        "run": {
            **{key: config[key] for key in ("model", "optimizer", "learning_rate", "full")},
            "steps": run["steps"],
            "task_loss": [log[0], log[-1]] if log else None,
        },
        "alignment_loss": {
            "before": float(losses_before.mean()),
            "after": float(losses_after.mean()),
            "examples": len(before),
        },
        "before": start,
        "after": _curvature(rows_after, change.names, k),
        "measurements": [
            {"step": m["step"], "measured": m["alignment_loss"], "predicted": m["predicted"]}
            for m in run["measurements"]
        ],
        "onset": _onset(run),
        "overlap": _overlap(scores, k, modes),
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"safeopt": version("safeopt-torch")},
    }


def _curvature(rows: GradientRows, names: Sequence[str], rank: int) -> dict[str, Any]:
    grams = torch.stack([rows.products_of(index).cpu() for index in range(len(names))])
    spectrum = Spectrum.of(grams.sum(0))
    trace = spectrum.trace
    shares = grams.diagonal(dim1=1, dim2=2).sum(1) / len(rows)
    return {
        "rank": rank,
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "tail": spectrum.tail(rank) / trace if trace > 0 else 0.0,
        "effective_rank": spectrum.effective_rank,
        "layers": [
            {"name": module_name(name), "share": share / trace if trace > 0 else 0.0}
            for name, share in zip(names, shares.tolist(), strict=True)
        ],
    }


def _onset(run: dict[str, Any]) -> dict[str, Any] | None:
    """The fitted rise of looks at the same examples.

    A protected run draws a few others at each look: what differs there is the examples, not time.
    """
    looks = run["measurements"]
    if not looks or any("examples" in look for look in looks):
        return None
    points = [(look["step"], look["alignment_loss"]) for look in looks]
    try:
        return fit_onset(*zip(*points, strict=True), start=points[0][1]).as_json()
    except ValueError:  # fewer than three looks found the loss risen: nothing to fit
        return None


def _overlap(scores: Sequence[OverlapScore], rank: int, modes: int) -> dict[str, Any]:
    """The scores, and their means weighted by the energy of each weight's change."""
    energy = sum(score.norm**2 for score in scores)

    def mean(name: str) -> float | None:
        parts = [(score.norm**2, getattr(score, name)) for score in scores]
        known = [(weight, value) for weight, value in parts if value is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * value for weight, value in known) / total if total > 0 else None

    names = ("share", "share_random", "share_matched")
    return {
        "rank": rank,
        "modes": modes,
        "alignment_update": "mean safety gradient at the aligned model",
        **{name: (mean(name) or 0.0) if energy > 0 else 0.0 for name in names},
        **{name: mean(name) for name in ("energy_kept", "mode_overlap", "modes_random")},
        "layers": [asdict(score) for score in scores],
    }
