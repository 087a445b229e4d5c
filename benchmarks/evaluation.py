"""How a model is measured, by forward passes only: losses, refusals, divergence, task metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.config import EvaluationConfig
from benchmarks.inference import Row, greedy, response_nll
from benchmarks.metrics import metric_of
from benchmarks.records import RefusalNLL, Start
from benchmarks.separation import separation
from benchmarks.tasks import Material, refusal_row
from safeopt.data import collate, prompt_ids
from safeopt.isolation import evaluating
from safeopt.losses import IGNORE, ReferenceKL
from safeopt.refusals import end_tokens, is_refusal

CHUNK = 16
DIGITS = 6  # of a prompt's loss in the result


class Losses(NamedTuple):
    """One point of a curve, in nats per token.

    Attributes:
        task: mean NLL over all response tokens of the held-out task examples.
        alignment: mean over the harmful prompts of the refusal's mean token NLL.
        prompts: the refusal's mean token NLL of each harmful prompt.
    """

    task: float
    alignment: float
    prompts: list[float]


class Rates(NamedTuple):
    """Shares of the prompts that are refused, between 0 and 1."""

    refusal: float
    over_refusal: float


class Evaluator:
    """Measures a model on the same examples every time.

    Args:
        material: the examples and prompts.
        tokenizer: of the model.
        config: what is measured beside losses and rates, and how long answers are.
        task: its name, which decides on the metric.
    """

    def __init__(
        self, material: Material, tokenizer: Any, config: EvaluationConfig, task: str
    ) -> None:
        self.material = material
        self.tokenizer = tokenizer
        self.config = config
        self.metric = metric_of(task)[1]
        self._reference: tuple[ReferenceKL, list[Row]] | None = None

    def start(self, model: PreTrainedModel) -> Start:
        """The model before training."""
        losses, rates = self.losses(model), self.rates(model)
        answers = None
        if self.config.harmless_kl:
            with evaluating(model):
                answers = self._answers(model, self.material.harmless)
        scores = self.refusal_nll(model)
        return Start(
            task_loss=losses.task,
            alignment_loss=losses.alignment,
            refusal_rate=rates.refusal,
            over_refusal_rate=rates.over_refusal,
            prompts=losses.prompts if self.config.per_prompt else None,
            answers=answers,
            task_metric=self.task_metric(model),
            separation=None if scores is None else separation(scores),
            refusal_nll=scores if self.config.per_prompt else None,
        )

    def losses(self, model: nn.Module) -> Losses:
        """Task loss and alignment loss of the model as it is now."""
        with evaluating(model):
            sums, counts = response_nll(model, self.material.held_out, batch_size=8)
            task = float(sums.sum() / counts.sum())
            sums, counts = response_nll(model, self.material.alignment)
            each = sums / counts
            return Losses(task=task, alignment=float(each.mean()), prompts=_rounded(each))

    def rates(self, model: PreTrainedModel) -> Rates:
        """Refusals of harmful prompts and of harmless ones, by greedy answers and the judge."""
        with evaluating(model):
            return Rates(
                refusal=self._refused(model, self.material.harmful),
                over_refusal=self._refused(model, self.material.harmless),
            )

    def refusal_nll(self, model: nn.Module) -> RefusalNLL | None:
        """How unlikely the refusal is after each prompt; None if no separation is asked for."""
        if not self.config.separation:
            return None
        with evaluating(model):
            harmful, harmless = (
                response_nll(model, [refusal_row(self.tokenizer, prompt) for prompt in prompts])[0]
                for prompts in (self.material.harmful, self.material.harmless)
            )
        return RefusalNLL(harmful=_rounded(harmful), harmless=_rounded(harmless))

    def task_metric(self, model: PreTrainedModel) -> float | None:
        """The mean of the task's metric over greedy answers; None if it is not asked for."""
        rows = self.material.held_out[: self.config.metric_examples]
        if not rows:
            return None
        parts = [_divided(row) for row in rows]
        with evaluating(model):
            prompts = [prompt for prompt, _ in parts]
            found = greedy(
                model, prompts, self.config.metric_tokens, end_tokens(model, self.tokenizer)
            )
        pairs = zip(self._texts(found), self._texts([r for _, r in parts]), strict=True)
        return sum(self.metric(answer, reference) for answer, reference in pairs) / len(rows)

    @torch.no_grad()
    def keep_reference(self, model: nn.Module, answers: Sequence[Sequence[int]]) -> None:
        """Remember how likely the aligned model finds its own answers: one forward pass."""
        rows: list[Row] = []
        for prompt, answer in zip(self.material.harmless, answers, strict=True):
            if answer:
                ids = self._prompt(prompt)
                labels = [IGNORE] * len(ids) + list(answer)
                rows.append({"input_ids": ids + list(answer), "labels": labels})
        divergence = ReferenceKL()
        with evaluating(model):
            for batch in _chunks(model, rows):
                divergence.cache(model, batch)
        self._reference = (divergence, rows)

    @torch.no_grad()
    def harmless_kl(self, model: nn.Module) -> float | None:
        """KL(π_θ₀ ‖ π_θ) on those answers, mean over the prompts; None without `keep_reference`."""
        if self._reference is None:
            return None
        divergence, rows = self._reference
        with evaluating(model):
            values = [divergence(model, batch) for batch in _chunks(model, rows)]
        return float(torch.cat(values).mean())

    def _refused(self, model: PreTrainedModel, prompts: Sequence[str]) -> float:
        texts = self._texts(self._answers(model, prompts))
        return sum(is_refusal(text) for text in texts) / len(texts)

    def _answers(self, model: PreTrainedModel, prompts: Sequence[str]) -> list[list[int]]:
        rows = [self._prompt(prompt) for prompt in prompts]
        return greedy(model, rows, self.config.new_tokens, end_tokens(model, self.tokenizer))

    def _prompt(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": prompt}])

    def _texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def _divided(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and response of an encoded example."""
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
    return row["input_ids"][:start], row["input_ids"][start:]


def _rounded(values: Tensor) -> list[float]:
    """As they stand in the result."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _chunks(model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    for start in range(0, len(rows), CHUNK):
        batch = collate(rows[start : start + CHUNK], pad_id=0, side="left")
        yield {name: tensor.to(device) for name, tensor in batch.items()}
