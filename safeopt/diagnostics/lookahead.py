"""Where Adam's first direction would lead: a forecast for the optimizer that people use.

The onset law speaks of gradient flow. Adam's first updates u_b on a few batches, on the other hand,
say directly where n steps at learning rate η would lead if nothing turned: by −ηn·ū, ū their mean.
Each safety example's log-odds move on nearly straight lines (`safeopt.curvature.window`), so

    z_i(n) = z_i + dz/dℓ_i · (−ηn ⟨g_i, ū⟩)

and the predicted alignment loss is the mean of the losses with these log-odds. The forecast knows
neither curvature nor Adam's second moments growing old, and where LoRA's B is zero nothing of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt.curvature.window import Window
from safeopt.diagnostics.measure import Evidence


def adam_rise(evidence: Evidence, learning_rate: float, steps: float) -> float:
    """Predicted rise of the alignment loss after so many steps of Adam, in nats a token.

    Args:
        evidence: what `measure` found.
        learning_rate: η; with a schedule, its mean.
        steps: n.

    Raises:
        ValueError: if a number is not positive.
    """
    for name, value in (("learning_rate", learning_rate), ("steps", steps)):
        if not value > 0:
            raise ValueError(f"{name}={value}: expected a positive number")
    along: Tensor = evidence.update @ evidence.weights
    losses = evidence.safety_losses
    window = Window(
        along.unsqueeze(1), losses, evidence.response_tokens, torch.full_like(losses, torch.nan)
    )
    moved = window.moved(torch.tensor([-learning_rate * steps], dtype=torch.float64, device="cpu"))
    return float((moved.losses - losses).mean())
