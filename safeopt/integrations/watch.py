"""A Trainer's run, checked before it starts and watched while it runs, whatever its optimizer.

One callback in a script that uses nothing else of this package::

    Trainer(..., callbacks=[WatchCallback()])

It does nothing until the environment says so: ``SAFEOPT_MONITOR=harmful_prompts.jsonl``.
"""

from __future__ import annotations

import logging
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from safeopt.integrations.versions import require

require("transformers", "accelerate")

from transformers import TrainerControl, TrainerState, TrainingArguments

from safeopt.data import ChatExample, read_examples
from safeopt.diagnostics import diagnose
from safeopt.diagnostics.snapshot import undrawn
from safeopt.integrations.bitsandbytes import keep_trainable
from safeopt.integrations.monitor import MonitorCallback, monitor_figures
from safeopt.integrations.trainer import build_probe, need_tokenizer
from safeopt.integrations.transformers import add_figures
from safeopt.probe import SafetyProbe
from safeopt.safety_examples import as_batches, check_likely, with_refusals

logger = logging.getLogger("safeopt")

VARIABLE = "SAFEOPT_MONITOR"


class WatchCallback(MonitorCallback):
    """Logs the Alignment Instability Condition before training, then watches the run.

    Both speak through the logger ``"safeopt"``, at the level of a warning, so that they are seen
    without any configuration. A check that fails is logged and keeps no run from starting. The
    monitor's figures are in ``trainer.state.log_history`` under ``monitor/``. Nothing that Trainer
    draws at random is drawn differently.

    Args:
        safety: JSON lines with harmful prompts (where a line has no response, the model's own
            refusal is taken; a resumed run goes on with those of the first, which are kept in
            Trainer's state), or a probe whose model is the Trainer's; by default the file that
            ``SAFEOPT_MONITOR`` names. Without any, the callback does nothing.
        batches: training batches to look at before training, at least 2; 0 leaves the check out.
        examples: safety examples to look at before training, at most.
        **options: of `SafetyMonitor`: ``budget``, ``every``, ``action``, ….

    Attributes:
        diagnosis: what was found before training, None where it was not looked at.

    Raises:
        FileNotFoundError: at the start of training, if there is no such file.
        ValueError: at the start of training, if the file is malformed or the model does not refuse
            its prompts, or not in the words given; if ``batches`` is 1 or negative.

    Cost: before training, an answer of 32 tokens for each prompt that has no response, a forward
    pass on at most 32 prompts and `safeopt.diagnose` on ``batches`` and ``examples``; then as
    `SafetyMonitor`.
    """

    def __init__(
        self,
        safety: SafetyProbe | str | Path | None = None,
        *,
        batches: int = 4,
        examples: int = 16,
        **options: Any,
    ) -> None:
        if batches < 0 or batches == 1:
            raise ValueError(f"batches={batches}: an interval needs two at least; 0 for no check")
        self._safety = safety if safety is not None else os.environ.get(VARIABLE) or None
        self._batches = batches
        self._examples = examples
        self.diagnosis: Any = None
        self.monitor = None
        self.last = None
        self._options = options
        self._refusals: list[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """The monitor's numbers, and the refusals that they were measured on."""
        return super().state() | ({"examples": self._refusals} if self._refusals else {})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Read the prompts, check the model as it is now, and begin to watch."""
        if self._safety is None:
            return
        model = kwargs["model"]
        keep_trainable(model)
        # A resumed model has drifted, and one that was watched before: neither can say any longer
        # how the aligned one refuses.
        resumed = state.global_step > 0
        watched = self.monitor is not None and self.monitor.probe.model is model
        if resumed or not watched:
            self._refusals = self.saved(state).get("examples")
            self._probe = self._read(model, kwargs.get("processing_class"), not resumed)
        if self._batches and not (resumed or watched):
            self._diagnose(args, kwargs["train_dataloader"])
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the monitor's figures to the log and to the Trainer's history."""
        add_figures(state, logs, monitor_figures(self))

    def _check(self, state: TrainerState, control: TrainerControl, *, measure: bool) -> None:
        if self.monitor is not None:
            super()._check(state, control, measure=measure)

    def _read(self, model: Any, tokenizer: Any, aligned: bool) -> SafetyProbe:
        if isinstance(self._safety, SafetyProbe):
            self._refusals = None
            return self._safety
        assert self._safety is not None
        need_tokenizer(tokenizer)
        prompts = read_examples(self._safety, need_response=False)
        if self._refusals:
            examples = [ChatExample(tuple(e["messages"]), e["finished"]) for e in self._refusals]
            if any(example.prompt not in [p.prompt for p in prompts] for example in examples):
                raise ValueError(
                    f"safety={self._safety}: other prompts than those of the run that is resumed"
                )
        else:
            examples = with_refusals(model, tokenizer, prompts, str(self._safety))
            if any(prompt.response is None for prompt in prompts):
                self._refusals = [asdict(example) for example in examples]
        batches = as_batches(tokenizer, examples)
        if aligned:
            check_likely(build_probe(model, batches), str(self._safety))
        return build_probe(model, batches)

    def _diagnose(self, args: TrainingArguments, loader: Any) -> None:
        try:
            drawn = _first_look(loader, self._batches, args.train_batch_size, args.seed)
            device = next(self._probe.model.parameters()).device
            task = [{name: x.to(device) for name, x in batch.items()} for batch in drawn]
            self.diagnosis = diagnose(self._probe, task, examples=self._examples, seed=args.seed)
        except Exception as error:
            logger.warning("check before training failed (%s: %s)", type(error).__name__, error)
        else:
            verdict = self.diagnosis.verdict
            logger.warning("check before training, %s: %s", verdict.risk, verdict.text)


def _first_look(loader: Any, batches: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Training batches drawn aside from the loader, which keeps its place and its random state."""
    dataset = loader.dataset
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"train_dataset={type(dataset).__name__}: it can be read only in order")
    indices = random.Random(seed).sample(range(len(dataset)), min(batches * size, len(dataset)))
    with undrawn():  # a data set or a collator may draw as it likes
        looked = [
            loader.collate_fn([dataset[index] for index in indices[start : start + size]])
            for start in range(0, len(indices), size)
        ]
    return [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in looked]
