"""AdamW with refusals replayed: the loss of a safety example joins the task's.

The strongest simple rival. It trains on the safety data, one prompt of the probe after another.
Mixing safety data into fine-tuning is folklore; see Bianchi et al. 2024, "Safety-Tuned LLaMAs"
(arXiv 2309.07875). This implementation is ours (Apache-2.0).

Simplified: the safety example has a pass of its own beside the batch instead of a place in it, so
that the task sees the same batches as under every other method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.inference import greedy
from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Batch, RoundRobin, Setup
from safeopt.losses import IGNORE, refusal_nll

ANSWER_TOKENS = 12


class ReplayOptions(BaseModel):
    """Options of `Replay`.

    Attributes:
        weight: of the safety example's loss beside the task loss.
        every: steps between two safety examples; with batches of four, 3 mixes in some 8%.
        answers: number of harmless prompts that are replayed too, every other time, with the
            model's own first words from before training: so that refusals do not spread to them.
    """

    model_config = ConfigDict(extra="forbid")
    weight: float = Field(default=1.0, gt=0)
    every: int = Field(default=1, ge=1)
    answers: int = Field(default=0, ge=0)


class Replay(AdamW):
    """Minimises task loss + weight × the NLL of one safety example."""

    Options: ClassVar[type[BaseModel]] = ReplayOptions

    def __init__(self, setup: Setup, options: ReplayOptions) -> None:
        super().__init__(setup, options)
        self.options = options
        self.steps = 0
        self.examples = RoundRobin(list(setup.safety))
        if options.answers:
            answered = self._own_answers(setup.harmless[: options.answers])
            pairs = [
                (refused, answered[index % len(answered)])
                for index, refused in enumerate(setup.safety)
            ]
            self.examples = RoundRobin([example for pair in pairs for example in pair])

    def after_backward(self) -> None:
        self.steps += 1
        if self.steps % self.options.every:
            return
        # A second backward pass adds to the task's gradient, which is the gradient of the sum of
        # both losses, and lets the refusal's share of the time be measured.
        example = self.examples.next()
        with self.cost.clock(), torch.enable_grad():
            (self.options.weight * refusal_nll(self.setup.model, example).mean()).backward()
        self.cost.add(example, backward=True)

    def _own_answers(self, refused: Sequence[Batch]) -> list[Batch]:
        """Harmless prompts with the model's greedy answers, which have no end.

        The answer's passes over one new token each are counted as one pass over the whole.
        """
        model = self.setup.model
        answered: list[Batch] = []
        model.eval()
        with self.cost.clock():
            for example in refused:
                labels = example["labels"][0]
                prompt = example["input_ids"][0][labels == IGNORE].tolist()
                answer = greedy(model, [prompt], ANSWER_TOKENS, ends=())[0]
                batch = {
                    "input_ids": torch.tensor([prompt + answer], device=labels.device),
                    "labels": torch.tensor([[IGNORE] * len(prompt) + answer], device=labels.device),
                }
                self.cost.add(batch, backward=False)
                answered.append(batch)
        model.train()
        return answered
