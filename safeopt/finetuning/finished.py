"""A finished run of `safeopt finetune`, loaded again: the model before and after."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safeopt.data import read_examples
from safeopt.diagnostics.profile import Change, adapter_change, full_change
from safeopt.finetuning.adapter import load_adapter
from safeopt.finetuning.folders import RESULT
from safeopt.finetuning.inputs import check_one_process, read_template
from safeopt.finetuning.report import REPORT, read_report
from safeopt.models import check_trainable, load_causal_lm
from safeopt.probe import SafetyProbe
from safeopt.safety_examples import as_batches, check_enough, check_likely, with_refusals


@dataclass
class Finished:
    """What `load_finished` found.

    Attributes:
        report: what ``run.json`` holds.
        folder: of the adapter or the model.
        change: the model before and after.
        batches: safety examples, with the aligned model's refusals.
    """

    report: dict[str, Any]
    folder: Path
    change: Change
    batches: list[dict[str, torch.Tensor]]


def load_finished(run: Path, safety: Path | None, examples: int) -> Finished:
    """Load a run.

    Args:
        run: the folder that `safeopt finetune` has written.
        safety: JSON lines with harmful prompts; None takes the run's own.
        examples: how many of them to use, at most, at least 2; drawn by the run's seed.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or a file is missing.
        ValueError: if several processes were started, ``examples`` is below 2, a file is malformed,
            a model or adapter cannot be loaded or has quantised weights, or the aligned model does
            not refuse at least two of the prompts, or would not say their responses.
    """
    check_one_process()
    path = run / REPORT
    if not path.is_file():
        raise FileNotFoundError(
            f"run={run}: there is no {REPORT}; expected a folder that `safeopt finetune` wrote"
        )
    if examples < 2:
        raise ValueError(f"examples={examples}: a spectrum needs at least two safety examples")
    report = read_report(path)
    config = report["config"]
    folder = run / RESULT[config["full"]]
    if not report["finished"] or not folder.is_dir():
        raise FileNotFoundError(f"run={run}: the run did not finish; continue it with --resume")
    source = safety or Path(config["safety"])
    prompts = read_examples(source, need_response=False)
    if examples < len(prompts):
        prompts = random.Random(config["seed"]).sample(prompts, examples)
    model, tokenizer = load_causal_lm(config["model"], argument=f"run={run}, model")
    check_trainable(model, f"run={run}, model={config['model']}")
    if config["chat_template"] is not None:
        tokenizer.chat_template = read_template(Path(config["chat_template"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    refusals = with_refusals(model.to(device), tokenizer, prompts, str(source))
    check_enough(len(refusals), 2, str(source))
    batches = as_batches(tokenizer, refusals)
    check_likely(SafetyProbe(model, batches), str(source))
    if config["full"]:
        change = full_change(model, load_causal_lm(str(folder), argument="run")[0].to(device))
    else:
        change = adapter_change(load_adapter(model, str(folder), "run"))
    return Finished(report, folder, change, batches)
