"""Lightning: alignment restored before its checkpoints, validations and the end of training.

Return a protected optimizer from ``configure_optimizers`` and add the callback::

    trainer = lightning.Trainer(..., callbacks=[SafetyCallback()])
"""

from __future__ import annotations

from typing import Any

from safeopt.integrations.versions import require

require("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from safeopt.optim import SafetySAM
from safeopt.optim.geometry import SafetyGeometry


class SafetyCallback(Callback):
    """Restores alignment where Lightning is about to save or validate, and at the end of training.

    Lightning's checkpoint callbacks decide by themselves when they save, so restoring hangs on the
    collection of the module's weights (``state_dict``): whatever saves during ``fit`` saves
    restored weights, with an optimizer state that belongs to them. After a step without a save or
    a validation nothing is done. ``SafetySAM(mode="lookahead")`` is at unperturbed weights in
    validation and in checkpoints.

    ``alignment_loss``, ``alignment_predicted`` and ``coupling`` are logged as far as known.

    Cost: a restoring, see `ProjectedAdamW.restore`, for each save and validation after a step.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be protected, before the first step.

        Raises:
            TypeError: if no optimizer is protected.
            ValueError: for ``SafetySAM(mode="two_pass")`` with accumulated gradients: Lightning
                hands the optimizer the last of the step's batches only.
        """
        optimizers = protected(trainer)
        if not optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise TypeError(
                f"configure_optimizers: it returned {names}, which is not protected; return a "
                "safeopt optimizer, or safeopt.safeguard(optimizer, probe)"
            )
        two_pass = any(isinstance(o, SafetySAM) and o.mode == "two_pass" for o in optimizers)
        if two_pass and trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: "
                'mode="two_pass" can repeat the last batch of a step only; use mode="lookahead"'
            )
        self.teardown(trainer, pl_module, "fit")  # Lightning leaves that out after an exception
        self._hook = pl_module.register_state_dict_pre_hook(_before_saving)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let ``lookahead`` optimizers perturb the parameters again."""
        for optimizer in protected(trainer):
            if isinstance(optimizer, SafetySAM):
                optimizer.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is known."""
        for optimizer in protected(trainer):
            geometry = optimizer.safety
            figures = {
                "alignment_loss": geometry.measured,
                "alignment_predicted": geometry.predicted,
                "coupling": geometry.coupling,
            }
            pl_module.log_dict({name: x for name, x in figures.items() if x is not None})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what will be validated and, where a checkpoint follows, saved."""
        if self._hook is not None:
            _restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model that is left; checkpoint callbacks come after this one."""
        _restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def protected(trainer: Trainer) -> list[Any]:
    """The protected ones among a Trainer's optimizers."""
    return [o for o in trainer.optimizers if isinstance(getattr(o, "safety", None), SafetyGeometry)]


def _before_saving(module: Any, *args: Any) -> None:
    """Restore the module whose weights are collected, by the optimizers of its present fit."""
    if module._trainer is not None:
        _restore(module._trainer)


def _restore(trainer: Trainer) -> None:
    for optimizer in protected(trainer):
        if optimizer.safety.active:
            optimizer.restore()
