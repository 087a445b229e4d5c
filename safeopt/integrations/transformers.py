"""Hugging Face Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeopt.optim.geometry import Measurement, SafetyGeometry


class SafetyCallback(TrainerCallback):
    """Restores alignment before a checkpoint is saved and at the end, and logs what was measured.

    Give it to a Trainer whose optimizer is one of ours or was passed through `safeopt.safeguard`:

        Trainer(..., optimizers=(ProjectedAdamW(...), None), callbacks=[SafetyCallback()])

    The log gets ``alignment_loss`` (the last measured), ``alignment_predicted`` and ``coupling``.

    Attributes:
        last: what the last restoring measured, None before it.
    """

    def __init__(self) -> None:
        self.last: Measurement | None = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore if this step is followed by a checkpoint or by the end of training."""
        final = control.should_training_stop or state.global_step >= state.max_steps
        if control.should_save or final:
            optimizer = unwrapped(kwargs["optimizer"])
            if safety_of(optimizer).active:
                self.last = optimizer.restore()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the safety figures to the log and to the Trainer's history."""
        figures = safety_figures(safety_of(unwrapped(kwargs["optimizer"])))
        if logs is not None:
            logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def safety_figures(safety: SafetyGeometry) -> dict[str, float]:
    """The figures worth logging, as far as they are known."""
    named = {
        "alignment_loss": safety.measured,
        "alignment_predicted": safety.predicted,
        "coupling": safety.coupling,
    }
    return {name: value for name, value in named.items() if value is not None}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that the user made, without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def safety_of(optimizer: Any) -> SafetyGeometry:
    """The geometry of a protected optimizer.

    Raises:
        TypeError: if the optimizer is not protected.
    """
    geometry = getattr(optimizer, "safety", None)
    if not isinstance(geometry, SafetyGeometry):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: SafetyCallback needs a safeopt optimizer; pass "
            "optimizers=(ProjectedAdamW(...), None) to the Trainer, or safeopt.safeguard(optimizer)"
        )
    return geometry
