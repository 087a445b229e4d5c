"""The result of a benchmark: its schema, and reading and writing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.config import ConfigError, RunConfig
from benchmarks.entries import problems
from safeopt.files import write_json

FILE = "result.json"
# Commands that write a `FILE` of their own, each with an entry that no other one's has.
OTHERS = {
    "monitor": "protected_runs",
    "overhead": "optimizer_step_ratio",
    "curvature": "eigenpairs",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(_Strict):
    """One measurement during training.

    Attributes:
        step: training steps taken before it. The last point is measured after `Method.finish`.
        task_loss: on held-out examples.
        alignment_loss: on harmful prompts that no method has seen.
        seconds: of training until here, without evaluation.
        prompts: the alignment loss of each prompt, if the config asks for it.
    """

    step: int
    task_loss: float
    alignment_loss: float
    seconds: float
    prompts: list[float] | None = None


class Span(_Strict):
    """A figure of the model before and after training."""

    start: float
    end: float


class Seconds(_Strict):
    """Wall time of one run; ``total`` is the sum of the others.

    Attributes:
        total: all of it.
        task: training without what the method spends on safety.
        safety: the method's own passes and arithmetic.
        evaluation: measurements of this run (the starting point's belong to no run).
    """

    total: float = 0.0
    task: float = 0.0
    safety: float = 0.0
    evaluation: float = 0.0


class Passes(_Strict):
    """Calls of the model in training."""

    task_forward: int = 0
    task_backward: int = 0
    safety_forward: int = 0
    safety_backward: int = 0


class Tokens(_Strict):
    """Tokens that went through these passes, without padding; ``task`` through forward passes."""

    task: int = 0
    safety_forward: int = 0
    safety_backward: int = 0


class RefusalNLL(_Strict):
    """Of each prompt, the refusal's negative log-likelihood in nats, summed over its tokens.

    Attributes:
        harmful: the prompts of the refusal rate, in their order.
        harmless: the prompts of the over-refusal rate, likewise.
    """

    harmful: list[float]
    harmless: list[float]


class Record(_Strict):
    """One finished run: one method with one seed.

    Attributes:
        batch_tokens: mean number of task tokens in a step, without padding.
        harmless_kl: KL(π_θ₀ ‖ π_θ) in nats per token on the aligned model's answers to harmless
            prompts, if the config asks for it.
        task_metric: the task's metric, between 0 and 1, likewise; see `benchmarks.metrics`.
        separation: area under the ROC curve between harmful and harmless prompts, likewise; see
            `benchmarks.separation`.
        refusal_nll: what the separation at the end is made of, if the config also asks for figures
            per prompt; None in results of earlier versions. That of the start stands in `Start`.
        peak_bytes: peak resident memory of the whole process during the run, sampled every 50
            milliseconds; on a GPU, the peak of the memory that torch has allocated there.
    """

    method: str
    model: str
    task: str
    seed: int
    steps: int
    learning_rate: float
    batch_tokens: float
    curve: list[Point]
    alignment_loss: Span
    task_loss: Span
    refusal_rate: Span
    over_refusal_rate: Span
    seconds: Seconds
    passes: Passes
    tokens: Tokens
    peak_bytes: int
    harmless_kl: float | None = None
    task_metric: Span | None = None
    separation: Span | None = None
    refusal_nll: RefusalNLL | None = None


class Start(_Strict):
    """The model before training: the same for all runs of a config.

    Attributes:
        answers: token ids of its answers to the harmless prompts, if the divergence is measured.
        refusal_nll: as in `Record`.
    """

    task_loss: float
    alignment_loss: float
    refusal_rate: float
    over_refusal_rate: float
    prompts: list[float] | None = None
    answers: list[list[int]] | None = None
    task_metric: float | None = None
    separation: float | None = None
    refusal_nll: RefusalNLL | None = None


class Failure(_Strict):
    """A run that crashed. It is tried again when the same command runs again."""

    method: str
    seed: int
    error: str


class Judge(_Strict):
    """How good the refusal judge is on answers that people have labelled."""

    precision: float
    recall: float
    n: int
    recall_consistent: float


class Result(_Strict):
    """All finished runs of one config.

    Attributes:
        config: what was run; a result is only continued with the same.
        start: None in results of earlier versions, which have it in every record.
        failures: runs that crashed, the last time that they were tried.
        environment: where and by what the runs were made.
        continued: likewise where it was continued by another commit or sources (edits that no
            commit has), with other packages or on another machine, if it was: some of the records
            are from there.
        judge: None for the tiny task, whose refusals are all the same sentence.
    """

    records: list[Record] = Field(default_factory=list)
    environment: dict[str, Any]
    continued: list[dict[str, Any]] = Field(default_factory=list)
    config: dict[str, Any]
    judge: Judge | None = None
    start: Start | None = None
    failures: list[Failure] = Field(default_factory=list)

    def run_config(self) -> RunConfig:
        """The config, checked.

        Raises:
            ConfigError: if this version cannot use it, for want of one of its methods for instance.
        """
        try:
            return RunConfig.model_validate(self.config)
        except ValidationError as error:
            raise ConfigError(
                f"the result's config cannot be used: {'; '.join(problems(error))}"
            ) from None

    def missing(self) -> list[str]:
        """The runs that the config asks for and that are not there, in words."""
        errors = {(failure.method, failure.seed): failure.error for failure in self.failures}
        return [
            f"{method}, seed {seed}: {errors.get((method, seed), 'has not run')}"
            for method in (entry["label"] or entry["name"] for entry in self.config["methods"])
            for seed in self.config["seeds"]
            if self.find(method, seed) is None
        ]

    def find(self, method: str, seed: int) -> Record | None:
        """The record of a finished run, or None."""
        found = [r for r in self.records if r.method == method and r.seed == seed]
        return found[0] if found else None


def read_result(folder: Path) -> Result | None:
    """The result in a folder, or None if there is none yet.

    Raises:
        ConfigError: if the file is another command's, damaged, or from another version of this
            benchmark.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (command := _other_command(found)) is not None:
            raise ConfigError(f"{folder}: {_held(command)}; name the folder of a `run` or `sweep`")
        return Result.model_validate(found)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise ConfigError(
            f"{path}: no result of this benchmark that can be read; choose another folder ({error})"
        ) from error


def leave_others(folder: Path, command: str) -> None:
    """Refuse to write a command's `FILE` over one that is not its own.

    Args:
        folder: where it would be written.
        command: one of `OTHERS`.

    Raises:
        ConfigError: if there is the result of another command.
    """
    path = folder / FILE
    if not path.exists():
        return
    try:
        found = _other_command(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no JSON: a file that is nobody's
        found = None
    if found != command:
        held = "holds the result of a `run`, or another file" if found is None else _held(found)
        raise ConfigError(f"{folder}: {held}; choose another --out")


def _other_command(content: Any) -> str | None:
    """Which of `OTHERS` has written a file with this content; None for any other file."""
    if not isinstance(content, dict):
        return None
    return next((command for command, entry in OTHERS.items() if entry in content), None)


def _held(command: str) -> str:
    """What a folder holds, and what shows it."""
    shown = (
        "prints its tables again with the same --out"
        if command == "curvature"
        else f"has printed its table; the figures are in {FILE}"
    )
    return f"holds the result of `python -m benchmarks {command}`, which {shown}"


def write_result(result: Result, folder: Path) -> Path:
    """Write the result in one step: a reader sees the old file or the new one, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_json(folder / FILE, result.model_dump(mode="json"))
