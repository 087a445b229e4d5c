"""``run.json``: what a run says of itself, how it is written and how it is read again."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeopt import __version__
from safeopt.finetuning.config import ADAMW
from safeopt.integrations.transformers import safety_of
from safeopt.optim.measurement import Measurement

if TYPE_CHECKING:
    from safeopt.finetuning.prepare import Prepared

REPORT = "run.json"
# A rise of the alignment loss over its budget, in nats a token, that other prompts make as well.
_UNNOTICED = 0.05
_NUMBER = (int, float)
# The entries that are read again, by their types.
_ENTRIES: dict[str, Any] = {
    "config": dict,
    "finished": bool,
    "steps": int,
    "log": list,
    "measurements": list,
    "seconds": _NUMBER,
}
_CHOICES: dict[str, Any] = {
    "model": str,
    "safety": str,
    "chat_template": (str, type(None)),
    "full": bool,
    "optimizer": str,
    "learning_rate": _NUMBER,
    "seed": int,
}


def run_report(prepared: Prepared, state: Any, finished: bool, seconds: float) -> dict[str, Any]:
    """What ``run.json`` holds: choices, data, counts, the log, measurements, cost and versions.

    What is known only at the end of a run is None: the alignment loss there, and its `failure`.

    Args:
        prepared: the run.
        state: the state of its Trainer.
        finished: whether it has trained to its end.
        seconds: training time so far, that before a resume included.
    """
    config = prepared.config
    report: dict[str, Any] = {
        "config": config.as_dict(),
        "finished": finished,
        "steps": state.global_step,
        "data": prepared.data,
        "train_examples": len(prepared.inputs.rows),
        "train_examples_given": prepared.inputs.train_given,
        "safety_prompts": {"used": prepared.inputs.refused[0], "given": prepared.inputs.refused[1]},
        "trainable_parameters": sum(
            p.numel() for p in prepared.inputs.model.parameters() if p.requires_grad
        ),
        "log": state.log_history,
        "alignment_loss": {"start": prepared.inputs.alignment_loss, "end": None},
        "failure": None,
        "measurements": [],
        "opening": prepared.inputs.probe.opening,
        "passes": prepared.inputs.probe.passes.as_dict(),
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            "safeopt": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
    }
    if config.optimizer != ADAMW:
        history = safety_of(prepared.optimizer).history
        report["measurements"] = [asdict(measurement) for measurement in history]
    return report


def failure(report: dict[str, Any]) -> str | None:
    """Why the result of a run is not to be used, in a sentence; None where it may be.

    Args:
        report: what `run_report` returns of a finished run, with the alignment loss at its end.
    """
    config, losses = report["config"], report["alignment_loss"]
    lower = f"a lower --learning-rate than {config['learning_rate']:g}"
    if not math.isfinite(losses["end"]):
        return f"the model is ruined: its losses are no finite numbers; start again with {lower}"
    rise = losses["end"] - losses["start"]
    if config["optimizer"] == ADAMW or rise <= config["budget"] + _UNNOTICED:
        return None  # what is lost without protection is what the comparison shows
    return (
        f"alignment was not kept: its loss has risen by {rise:.3f} nats a token, and "
        f"budget={config['budget']:g} was accepted; start again with {lower} or more safety "
        "prompts, or mend the result with safeopt repair"
    )


def read_report(path: Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        ValueError: naming the file, if it is malformed.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: it is no JSON file ({error})") from None
    problem = _problem(report)
    if problem:
        raise ValueError(f"{path}: {problem}; expected what `safeopt finetune` has written")
    return dict(report)


def _problem(report: Any) -> str | None:
    """What is wrong with the entries that are read again."""
    if not isinstance(report, Mapping):
        return f"it holds {type(report).__name__}"
    if not isinstance(report.get("data", {}), dict):
        return f"data={report['data']!r}"
    problem = _wrong(report, _ENTRIES, "") or _wrong(report["config"], _CHOICES, "config.")
    if problem:
        return problem
    if not all(isinstance(line, dict) for line in report["log"]):
        return "log holds something other than its lines"
    names = {field.name for field in fields(Measurement)}
    if not all(isinstance(look, dict) and names <= set(look) for look in report["measurements"]):
        return f"measurements holds something without {', '.join(sorted(names))}"
    return None


def _wrong(entries: Mapping[str, Any], types: Mapping[str, Any], where: str) -> str | None:
    for name, kind in types.items():
        if name not in entries:
            return f"{where}{name} is missing"
        if not isinstance(entries[name], kind):
            return f"{where}{name}={entries[name]!r}"
    return None
