"""What a diagnosis means, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safeopt.diagnostics.conditions import Condition, Figures, Thresholds
from safeopt.diagnostics.measure import Evidence

Risk = Literal["at risk", "at risk at once", "not shown", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """What the three conditions say together.

    Attributes:
        risk: ``"at risk"`` where all three hold; ``"at risk at once"`` where the task's first steps
            already move the safety subspace; ``"not shown"`` where nothing bends the trajectory
            into it; ``"unclear"`` where the subspace does not hold most of the curvature.
        text: the same in one or two sentences.
        notes: what a reader must know to read the figures.
    """

    risk: Risk
    text: str
    notes: tuple[str, ...]


def verdict(
    conditions: tuple[Condition, Condition, Condition],
    figures: Figures,
    evidence: Evidence,
    rank: int,
    thresholds: Thresholds,
) -> Verdict:
    """Put the conditions into words."""
    low_rank, orthogonal, coupled = conditions
    if not low_rank.holds:
        risk: Risk = "unclear"
        text = (
            f"The top {rank} directions hold only {1 - figures.tail:.0%} of the safety curvature: "
            "it is not of low rank here, and the other two figures see that part only. Raise the "
            "rank and the number of safety examples."
        )
    elif not orthogonal.holds:
        risk = "at risk at once"
        text = (
            f"The task's gradient lies within the safety subspace by {figures.overlap:.0%} of its "
            "length: alignment moves from the first step, before any curvature matters. Train with "
            "protection, and measure the alignment loss early."
        )
    elif coupled.holds:
        risk = "at risk"
        text = (
            "All three conditions hold: alignment hangs on few directions, the first steps leave "
            "them alone, and the task's curvature turns the trajectory into them. What looks "
            "harmless at the start need not stay so. Train with protection."
        )
    else:
        risk = "not shown"
        text = (
            "The task's curvature turns the trajectory into the safety subspace no more than into "
            "random directions. The condition does not hold at the start; it can come to hold "
            "during training, so watch the alignment loss."
        )
    unsure = [c.name.replace("_", " ") for c in conditions if not c.certain]
    if unsure:
        text += f" The interval of {' and of '.join(unsure)} crosses its threshold."
    return Verdict(risk, text, tuple(_notes(figures, evidence, rank, thresholds)))


def _notes(figures: Figures, evidence: Evidence, rank: int, thresholds: Thresholds) -> list[str]:
    examples = len(evidence.safety_losses)
    notes = [
        f"{examples} safety examples show at most {examples} directions. Gradients without any "
        f"common direction would leave {1 - rank / examples:.0%} in the tail and have an effective "
        f"rank of {examples}; found: {figures.tail:.1%} and {figures.effective_rank:.1f}."
    ]
    blind = set(evidence.blind)
    if blind:
        entries = sum(
            size for name, size in zip(evidence.names, evidence.sizes, strict=True) if name in blind
        )
        lora = all("lora_" in name for name in blind)
        cause = (
            "their adapters' other factor starts at zero (LoRA's B = 0), so neither the safety "
            "loss nor the task's sees them yet. They wake as soon as B has moved: the figures "
            "speak of the first steps only, and the coupling leaves their part out."
            if lora
            else "no safety gradient reaches them at this point."
        )
        notes.append(f"{entries:,} of {evidence.size:,} parameters are blind here: {cause}")
    if figures.top > thresholds.top_eigenvalue:
        notes.append(
            f"The top eigenvalue, {figures.top:.3g}, exceeds {thresholds.top_eigenvalue:g}, which "
            "the paper flags. Its scale depends on the loss (mean or sum over tokens) and on the "
            "parameters chosen: compare it with the same model's before, not across models."
        )
    notes.append(
        "The curvature is the empirical Fisher matrix: its directions are right, its scale shrinks "
        "where the model is sure of its refusals."
    )
    return notes
