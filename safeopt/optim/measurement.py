"""What is measured at a refresh, and what a measurement must be."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One look at the alignment loss.

    Attributes:
        step: optimizer steps taken before it.
        alignment_loss: mean over the examples drawn, before any restoring. Once all examples of the
            probe have had their turn, they repeat: earlier steps were taken for them, and unseen
            prompts may be worse off.
        predicted: what the surrogate expected there; None at the first look.
        restored_to: what is expected of these examples after restoring or, where the trial
            examples were run again, their loss; None where nothing was restored.
        examples: number of safety examples drawn.
    """

    step: int
    alignment_loss: float
    predicted: float | None
    restored_to: float | None
    examples: int


def finite(loss: float) -> float:
    """A safety loss that can be used.

    Raises:
        FloatingPointError: if it is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the safety loss is {loss}, not a finite number: the model's outputs on the safety "
            "examples have overflowed; lower the learning rate, or train in float32 or bfloat16"
        )
    return loss
