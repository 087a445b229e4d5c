"""AdamW with refusals replayed: at every step the loss of one safety example joins the task's.

The strongest simple rival. It trains on the safety data, one prompt of the probe after another.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import RoundRobin, Setup
from safeopt.losses import refusal_nll


class ReplayOptions(BaseModel):
    """Options of `Replay`.

    Attributes:
        weight: of the refusal's loss beside the task loss.
    """

    model_config = ConfigDict(extra="forbid")
    weight: float = Field(default=1.0, gt=0)


class Replay(AdamW):
    """Minimises task loss + weight × the refusal NLL of one safety example."""

    Options: ClassVar[type[BaseModel]] = ReplayOptions

    def __init__(self, setup: Setup, options: ReplayOptions) -> None:
        super().__init__(setup, options)
        self.weight = options.weight
        self.examples = RoundRobin(setup.safety)

    def after_backward(self) -> None:
        # A second backward pass adds to the task's gradient, which is the gradient of the sum of
        # both losses, and lets the refusal's share of the time be measured.
        example = self.examples.next()
        with self.cost.clock(), torch.enable_grad():
            (self.weight * refusal_nll(self.setup.model, example).mean()).backward()
        tokens = example["input_ids"].numel()
        self.cost.forward += 1
        self.cost.backward += 1
        self.cost.forward_tokens += tokens
        self.cost.backward_tokens += tokens
