"""Constrained fine-tuning: the first tokens of a response may move less than the later ones.

Qi et al. 2024, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (arXiv
2406.05946), section 4: the loss is −Σ_t (2/β_t)·log σ(β_t·log(π_θ/π_θ₀)), whose gradient is that of
the usual loss at the aligned model and fades where a token has become likelier, the faster the
larger β_t is. β is 0.5 for the first token, 2 for the next four and 0.1 for the others, as there.
This implementation is ours (Apache-2.0).

Simplified: the learning rate is not warmed up. The authors warm it up, also for plain fine-tuning;
no method of this benchmark does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, TaskLoss, holding, snapshot
from safeopt.losses import response_log_probs, token_nll


class ConstrainedSFTOptions(BaseModel):
    """Options of `ConstrainedSFT`.

    Attributes:
        strength: factor of β on the first five tokens; 1 is the paper's choice.
    """

    model_config = ConfigDict(extra="forbid")
    strength: float = Field(default=1.0, gt=0)


class ConstrainedSFT(AdamW):
    """AdamW on the constrained loss; one more forward pass a step, at the aligned model."""

    Options: ClassVar[type[BaseModel]] = ConstrainedSFTOptions

    def __init__(self, setup: Setup, options: ConstrainedSFTOptions) -> None:
        super().__init__(setup, options)
        first = [0.5, 2.0, 2.0, 2.0, 2.0]
        self.beta = torch.tensor([b * options.strength for b in first] + [0.1])
        self.reference = snapshot(setup.params)

    def step(self, task_loss: TaskLoss) -> float:
        self.optimizer.zero_grad()
        # First the reference: it writes into the parameters, which a later graph will need.
        with self.cost.clock(), torch.no_grad(), holding(self.setup.params, self.reference):
            before, _ = token_nll(*response_log_probs(self.setup.model, task_loss.batch))
        self.cost.add(task_loss.batch, backward=False)
        nll, mask = token_nll(*task_loss.log_probs())
        beta = self.beta.to(nll)[(mask.cumsum(-1) - 1).clamp(0, len(self.beta) - 1)]
        loss = -(2 / beta) * F.logsigmoid(beta * (before - nll))
        ((loss * mask).sum() / mask.sum()).backward()
        self.optimizer.step()
        return float(nll.detach().sum() / mask.sum())
