"""``training_step_ratio``, with the pull, too, and SAM's two: whole LoRA training steps of SmolLM2.

All beside AdamW's. A step is one batch forward and backward, and the optimizer's step; SAM's second
pass is made by the same closure. No refresh falls into the measured steps: what refreshes cost is
the demo's figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.config import LoraConfig, RunConfig
from benchmarks.models import load, trainable
from benchmarks.overhead.subspace import ONE_REFRESH, PULL, RANK, Comparison, fill_subspace
from benchmarks.tasks import batches, material, single_batches, task_loss
from safeopt import ProjectedAdamW, SafetyProbe, SafetySAM

PLAIN, PROTECTED, ELASTIC = "AdamW", "ProjectedAdamW", "ProjectedAdamW, elastic"
TWO_PASS, LOOKAHEAD = "SafetySAM, two_pass", "SafetySAM, lookahead"
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    PROTECTED: ProjectedAdamW,
    ELASTIC: partial(ProjectedAdamW, elastic=PULL),
    TWO_PASS: partial(SafetySAM, mode="two_pass"),
    LOOKAHEAD: partial(SafetySAM, mode="lookahead"),
}
TRIAL = 4
BATCHES = 8


@contextmanager
def steps(config: RunConfig) -> Iterator[Comparison]:
    """The training steps to compare.

    Every optimizer trains an adapter of its own on the same frozen model.

    Args:
        config: model, task, batch size, learning rate and adapters.
    """
    model, tokenizer = load(config.model)
    data = material(config, tokenizer)
    device = next(model.parameters()).device
    lora = config.lora or LoraConfig()
    with trainable(model, lora, 0) as (adapted, first):
        safety = single_batches(data.safety, 0, device)[: RANK + TRIAL]
        task = list(batches(data.train, config.batch_size, BATCHES, 0, data.pad, device))
        rivals, rank = {}, RANK
        for name in (PLAIN, *OPTIMIZERS):
            adapter = name.replace(", ", "-")
            adapted.add_adapter(
                adapter,
                peft.LoraConfig(
                    r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules)
                ),
            )
            adapted.set_adapter(adapter)
            params = [p for p in adapted.parameters() if p.requires_grad]
            if name == PLAIN:
                optimizer: Any = torch.optim.AdamW(params, lr=config.learning_rate)
            else:
                probe = SafetyProbe(adapted, safety)
                optimizer = OPTIMIZERS[name](
                    params, lr=config.learning_rate, probe=probe, trial_examples=TRIAL,
                    **ONE_REFRESH,
                )  # fmt: skip
                rank = min(rank, fill_subspace(optimizer, params))
            rivals[name] = _Rival(adapted, adapter, optimizer, task)
        runs = {name: rival.step for name, rival in rivals.items()}
        yield Comparison(runs, sum(p.numel() for p in first), rank)


class _Rival:
    """An optimizer with its adapter."""

    def __init__(
        self, model: Any, adapter: str, optimizer: torch.optim.Optimizer, task: list[Any]
    ) -> None:
        self.model, self.adapter = model, adapter
        self.optimizer = optimizer
        self.task = task
        self.taken = 0

    def step(self) -> None:
        """One training step on the next batch."""
        if self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter)
        batch = self.task[self.taken % len(self.task)]
        self.taken += 1

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = task_loss(self.model, batch)
            loss.backward()
            return loss.detach()

        self.optimizer.step(closure)  # type: ignore[arg-type]
