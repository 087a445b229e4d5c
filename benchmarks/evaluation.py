"""How a model is measured, by forward passes only: losses, refusals and over-refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from benchmarks.inference import greedy, response_nll
from benchmarks.tasks import Material
from safeopt.data import prompt_ids
from safeopt.refusals import is_refusal


class Losses(NamedTuple):
    """One point of a curve, in nats per token.

    Attributes:
        task: mean NLL over all response tokens of the held-out task examples.
        alignment: mean over the harmful prompts of the refusal's mean token NLL.
    """

    task: float
    alignment: float


class Rates(NamedTuple):
    """Shares of the prompts that are refused, between 0 and 1."""

    refusal: float
    over_refusal: float


class Evaluator:
    """Measures a model on the same examples every time.

    Args:
        material: the examples and prompts.
        tokenizer: of the model.
        new_tokens: length of an answer.
    """

    def __init__(self, material: Material, tokenizer: Any, new_tokens: int) -> None:
        self.material = material
        self.tokenizer = tokenizer
        self.new_tokens = new_tokens

    def losses(self, model: nn.Module) -> Losses:
        """Task loss and alignment loss of the model as it is now."""
        with _evaluating(model):
            sums, counts = response_nll(model, self.material.held_out, batch_size=8)
            task = float(sums.sum() / counts.sum())
            sums, counts = response_nll(model, self.material.alignment)
            return Losses(task=task, alignment=float((sums / counts).mean()))

    def rates(self, model: nn.Module) -> Rates:
        """Refusals of harmful prompts and of harmless ones, by greedy answers and the judge."""
        with _evaluating(model):
            return Rates(
                refusal=self._refused(model, self.material.harmful),
                over_refusal=self._refused(model, self.material.harmless),
            )

    def _refused(self, model: nn.Module, prompts: Sequence[str]) -> float:
        rows = [prompt_ids(self.tokenizer, [{"role": "user", "content": p}]) for p in prompts]
        answers = greedy(model, rows, self.new_tokens, self._ends(model))
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return sum(is_refusal(text) for text in texts) / len(texts)

    def _ends(self, model: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and the model's own."""
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        return list({end for end in ends if end is not None})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
