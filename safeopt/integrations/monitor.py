"""`SafetyMonitor` in a Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeopt.diagnostics.monitor import Check, SafetyMonitor
from safeopt.integrations.transformers import add_figures, unwrapped
from safeopt.probe import SafetyProbe


class MonitorCallback(TrainerCallback):
    """Watches a Trainer's run, whatever its optimizer; use `install_monitor`.

    It measures before every checkpoint and at the end of training, too, and ends training where the
    monitor asks for it. After a rollback parameters, optimizer, scheduler and random states are
    those of the safe checkpoint; Trainer's count of steps and its data go on.

    Args:
        probe: safety examples; its model is the Trainer's.
        **options: arguments of `SafetyMonitor`, except ``optimizer`` and ``others``.

    Attributes:
        monitor: the monitor of the present run, None before it.
        last: the last check.
    """

    def __init__(self, probe: SafetyProbe, **options: Any) -> None:
        self.monitor: SafetyMonitor | None = None
        self.last: Check | None = None
        self._probe = probe
        self._options = options

    def state(self) -> dict[str, Any]:
        """What Trainer's checkpoints carry, as plain data: the monitor's numbers."""
        return self.monitor.state_dict() if self.monitor else {}

    def saved(self, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint that is resumed carries; empty for a run that was not watched."""
        kept: Any = state.stateful_callbacks or {}  # a dict, though it is annotated as a list
        return dict(kept.get(self._key, {})) if state.global_step > 0 else {}

    @property
    def _key(self) -> str:
        # Not the class's name alone: an entry under that makes Trainer replace the callback by a
        # new one without arguments (restore_callback_states_from_checkpoint).
        return f"safeopt.{type(self).__name__}"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin to watch; a resumed or repeated run continues with the first run's reference."""
        before = self.monitor
        if before is not None:
            before.close()  # it may have been interrupted: auto_find_batch_size begins again
        self.monitor = SafetyMonitor(
            unwrapped(kwargs["optimizer"]),
            self._probe,
            others=[kwargs["lr_scheduler"]],
            **self._options,
        )
        if saved := self.saved(state):
            self.monitor.load_state_dict(saved)
        elif before is not None and before.probe is self._probe:
            self.monitor.reference = before.reference  # its model has been trained since

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check; end training where the monitor asks for it."""
        final = control.should_training_stop or state.global_step >= state.max_steps
        self._check(state, control, measure=_may_save(args, control) or final)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure if the epoch is followed by a checkpoint."""
        if _may_save(args, control):
            self._check(state, control, measure=True)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the optimizer alone."""
        if self.monitor is not None:
            self.monitor.close()

    def _check(self, state: TrainerState, control: TrainerControl, *, measure: bool) -> None:
        assert self.monitor is not None
        self.last = self.monitor.check(state.global_step, measure=measure)
        if self.last.stop:
            control.should_training_stop = True
        kept: Any = state.stateful_callbacks
        kept[self._key] = self.state()


def _may_save(args: TrainingArguments, control: TrainerControl) -> bool:
    """Whether a checkpoint may follow; with ``save_strategy="best"`` an evaluation decides."""
    return control.should_save or (control.should_evaluate and args.save_strategy == "best")


class _Log(TrainerCallback):
    """Adds a monitor's figures to every log, before Trainer's reporters get it."""

    def __init__(self, watch: MonitorCallback) -> None:
        self._watch = watch

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the log and to the Trainer's history."""
        add_figures(state, logs, monitor_figures(self._watch))


def install_monitor(trainer: Trainer, probe: SafetyProbe, **options: Any) -> MonitorCallback:
    """Watch a Trainer's run with a `SafetyMonitor`, and log its figures where Trainer reports to.

    Args:
        trainer: with any optimizer, its own default included; it has not trained yet.
        probe: safety examples; its model is ``trainer.model``.
        **options: ``budget``, ``every``, ``action``, … of `SafetyMonitor`.

    Returns:
        The callback; ``callback.monitor.history`` holds what was measured.

    Raises:
        TypeError: at the start of training, if an option is unknown.
        ValueError: at the start of training, if an option is out of its range.
    """
    callback = MonitorCallback(probe, **options)
    trainer.add_callback(callback)  # last: after what others do at a step's end, restoring too
    trainer.callback_handler.callbacks.insert(0, _Log(callback))  # first: before the reporters
    return callback


def monitor_figures(callback: MonitorCallback) -> dict[str, float]:
    """The last check's figures and the last measured alignment loss, under ``monitor/``."""
    if callback.last is None or callback.monitor is None:
        return {}
    figures = callback.last.figures()
    history = callback.monitor.history
    if history and history[-1].alignment_loss is not None:
        figures["alignment_loss"] = history[-1].alignment_loss
    return {f"monitor/{name}": value for name, value in figures.items()}
