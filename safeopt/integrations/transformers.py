"""Hugging Face Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

from typing import Any

from safeopt.integrations.versions import require

require("transformers", "accelerate")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.measurement import Measurement


class SafetyLog(TrainerCallback):
    """Adds ``alignment_loss`` (the last measured), ``alignment_predicted`` and ``coupling``."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the safety figures to the log and to the Trainer's history."""
        if kwargs.get("optimizer") is not None:  # None: an evaluation before training
            add_figures(state, logs, safety_figures(safety_of(unwrapped(kwargs["optimizer"]))))


class SafetyCallback(SafetyLog):
    """Restores alignment before a checkpoint is saved and at the end, and logs what was measured.

    Give it to a Trainer whose optimizer is one of ours or was passed through `safeopt.safeguard`:

        Trainer(..., optimizers=(ProjectedAdamW(...), None), callbacks=[SafetyCallback()])

    The figures of `SafetyLog` are in ``trainer.state.log_history``. Trainer calls TensorBoard and
    the like before it; `install` it instead where they shall get the figures, too, or where
    callbacks that stand after it ask for checkpoints.

    Attributes:
        last: what the last restoring measured, None before it.
    """

    def __init__(self) -> None:
        self.last: Measurement | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be protected before the first step.

        Raises:
            TypeError: if the Trainer's optimizer is not protected.
            ValueError: if a checkpoint without the optimizer's state is resumed.
        """
        safety = safety_of(unwrapped(kwargs["optimizer"]))
        # Trainer passes over a missing state in silence; the drifted model would be the reference.
        if safety.active and state.global_step > 0 and safety.subspace is None:
            raise ValueError(
                "resume_from_checkpoint: the checkpoint holds no state of the optimizer "
                "(save_only_model=True), and how the aligned model refuses is no longer known; "
                "resume from one that does, or start again from the aligned model"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore if this step is followed by a checkpoint or by the end of training."""
        # With save_strategy="best" an evaluation decides whether to save what was evaluated.
        best = control.should_evaluate and args.save_strategy == "best"
        final = control.should_training_stop or state.global_step >= state.max_steps
        if control.should_save or best or final:
            self._restore(kwargs["optimizer"])

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore if the epoch is followed by a checkpoint, or ended by a callback."""
        best = control.should_evaluate and args.save_strategy == "best"
        # Before the best checkpoint is loaded, which must not meet perturbed parameters.
        if control.should_save or best or control.should_training_stop:
            self._restore(kwargs["optimizer"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore where another callback ended training, unless a checkpoint was loaded."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._restore(kwargs["optimizer"])

    def _restore(self, wrapped: Any) -> None:
        optimizer = unwrapped(wrapped)
        if safety_of(optimizer).active:
            self.last = optimizer.restore()


def install(trainer: Trainer) -> SafetyCallback:
    """Add a `SafetyCallback` to a Trainer such that its loggers get the safety figures as well.

    Whoever asks for a checkpoint, the weights in it are restored.

    Args:
        trainer: with a protected optimizer; it has not trained yet.

    Returns:
        The callback.
    """
    callback = SafetyCallback()
    trainer.add_callback(callback)  # last: it acts on what the others decide at a step's end
    trainer.callback_handler.callbacks.insert(0, SafetyLog())  # first: before the loggers
    save = trainer._save_checkpoint

    def restore_and_save(*args: Any, **kwargs: Any) -> Any:
        callback._restore(trainer.optimizer)  # nothing is left to do after most steps' ends
        return save(*args, **kwargs)

    trainer._save_checkpoint = restore_and_save  # type: ignore[method-assign]
    return callback


def safety_figures(safety: SafetyGeometry) -> dict[str, float]:
    """The figures worth logging, as far as they are known."""
    named = {
        "alignment_loss": safety.measured,
        "alignment_predicted": safety.predicted,
        "coupling": safety.coupling,
    }
    return {name: value for name, value in named.items() if value is not None}


def add_figures(
    state: TrainerState, logs: dict[str, Any] | None, figures: dict[str, float]
) -> None:
    """Add figures to a log, which goes on to later callbacks, and to the Trainer's history."""
    if logs is not None:
        logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)


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
