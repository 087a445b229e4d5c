"""Train with Hugging Face Trainer, protected, and write adapter, checkpoints, report and plot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from safeopt.data import collate, pad_id
from safeopt.files import write_json
from safeopt.finetuning.checkpoints import written_folders
from safeopt.finetuning.config import ADAMW
from safeopt.finetuning.curves import save_curves
from safeopt.finetuning.folders import CURVES, RESULT
from safeopt.finetuning.prepare import Prepared
from safeopt.finetuning.report import REPORT, failure, read_report, run_report
from safeopt.integrations.transformers import SafetyCallback, safety_figures, safety_of, unwrapped
from safeopt.safety_examples import alignment_loss
from safeopt.timing import clock


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        step: optimizer steps taken.
        max_steps: steps of the whole run.
        task_loss: of the last line of the log, None before the first.
        figures: alignment loss measured and predicted, and coupling, as far as known.
        safety_share: share of the time since the start that went into safety passes; None where a
            resumed run has no step left.
    """

    step: int
    max_steps: int
    task_loss: float | None
    figures: dict[str, float]
    safety_share: float | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: False if it was interrupted; a checkpoint was saved then.
        folder: where the adapter or model lies.
        report: what was written to ``run.json``.
    """

    finished: bool
    folder: Path
    report: dict[str, Any]


def run(
    prepared: Prepared,
    listener: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a prepared run and write its results.

    Args:
        prepared: from `prepare`.
        listener: called after every step, and once where a resumed run has none left.
        should_stop: asked after every step; True saves a checkpoint and ends the run.

    Returns:
        How it ended.
    """
    config = prepared.config
    out = Path(config.out)
    out.resolve().mkdir(parents=True, exist_ok=True)  # a link may lead to what is not there yet
    # Training time before a resume; `prepare` has checked that file.
    earlier = float(read_report(out / REPORT)["seconds"]) if config.resume else 0.0
    watcher = _Watcher(prepared, listener, should_stop, earlier)
    callbacks: list[TrainerCallback] = [watcher]
    if config.optimizer != ADAMW:
        callbacks.append(SafetyCallback())
    trainer = Trainer(
        model=prepared.inputs.model,
        args=TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
            learning_rate=config.learning_rate,
            logging_steps=config.logging_steps,
            save_steps=config.save_steps,
            save_total_limit=2,
            seed=config.seed,
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would show the loss of a ruined model as a number
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=_Rows(prepared.inputs.rows),
        data_collator=_Collator(pad_id(prepared.inputs.tokenizer)),
        processing_class=prepared.inputs.tokenizer,
        optimizers=(prepared.optimizer, None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # the listener shows progress, nobody prints
    if config.overwrite:  # only now that Trainer has refused nothing
        _clear(out)
    with suppress(_NothingLeftError):
        trainer.train(resume_from_checkpoint=prepared.checkpoint)
    finished = not watcher.stopped
    folder = out / RESULT[config.full]
    if finished:
        trainer.save_model(str(folder))
        prepared.inputs.tokenizer.save_pretrained(str(folder))
    report = run_report(prepared, trainer.state, finished, watcher.seconds)
    report["alignment_loss"]["end"] = alignment_loss(prepared.inputs.probe)
    report["failure"] = failure(report) if finished else None
    write_json(out / REPORT, report)
    save_curves(report, out / CURVES)
    return Outcome(finished, folder, report)


def _clear(out: Path) -> None:
    """Remove what an earlier run wrote, so that its checkpoints are not taken for this one's."""
    for path in (*written_folders(out), out / CURVES, out / REPORT):
        # Of a link only itself is the run's, not what it leads to.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Rows:
    """Encoded examples as the dataset that Trainer expects."""

    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class _Collator:
    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        return collate(rows, self.pad_id)


class _NothingLeftError(Exception):
    """The checkpoint is the last step's: Trainer would take one more before it looks."""


class _Watcher(TrainerCallback):
    """Reports progress, keeps ``run.json`` and ends the run at a step's end when asked to."""

    def __init__(
        self,
        prepared: Prepared,
        listener: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        earlier: float,
    ) -> None:
        self.prepared = prepared
        self.listener = listener
        self.should_stop = should_stop
        self.earlier = earlier
        self.stopped = False
        self._began = 0.0
        self._safety_before = 0.0
        self._task_loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = clock()
        self._safety_before = self.prepared.inputs.probe.passes.seconds
        self._write(state)  # not before: a checkpoint that does not load leaves the file as it was
        if state.global_step >= state.max_steps:
            logged = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            self._task_loss = next(logged, None)
            self._tell(state, kwargs["optimizer"], timed=False)
            raise _NothingLeftError

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)  # where a run that is killed goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.should_stop() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        if not control.should_log:
            self._tell(state, kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The step's own loss is known only here, after alignment was restored where it had to be.
        latest = state.log_history[-1]
        if "loss" in latest:
            self._task_loss = latest["loss"]
            self._tell(state, kwargs["optimizer"])

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self.earlier + clock() - self._began

    def _write(self, state: Any) -> None:
        if state.is_world_process_zero:
            report = run_report(self.prepared, state, False, self.seconds)
            write_json(Path(self.prepared.config.out) / REPORT, report)

    def _tell(self, state: Any, optimizer: Any, *, timed: bool = True) -> None:
        protected = self.prepared.config.optimizer != ADAMW
        safety_seconds = self.prepared.inputs.probe.passes.seconds - self._safety_before
        self.listener(
            Progress(
                state.global_step,
                state.max_steps,
                self._task_loss,
                safety_figures(safety_of(unwrapped(optimizer))) if protected else {},
                safety_seconds / (clock() - self._began) if timed else None,
            )
        )
