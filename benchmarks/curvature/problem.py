"""What the curvature benchmark measures on: sizes, models and data, real or tiny.

The eigenpairs are those of the mean NLL of the refusals' tokens, for a model with adapters that has
taken some steps of a harmless task: at LoRA's start half of the curvature is zero, and a method
that is good there would say little about the rest of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.config import (
    ALIGNED,
    TINY,
    EvaluationConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
)
from benchmarks.models import load, trainable
from benchmarks.tasks import Material, batches, material, task_loss
from safeopt.data import collate
from safeopt.losses import IGNORE, response_log_probs


@dataclass(frozen=True)
class Setting:
    """The sizes of the benchmark.

    Attributes:
        model: name of the model.
        task: name of the harmless task, and the length of its examples.
        length: tokens of a task example.
        layers: the model's first layers, to which it is cut for the eigenpairs; None for all.
        wide: rank and places of its adapters.
        modules: those places.
        examples: safety prompts behind the eigenpairs.
        rank: number of eigenpairs.
        tolerance: largest relative residual.
        steps: AdamW steps before the first basis, and again between it and the matrix that all
            implementations work on.
        learning_rate: of these steps.
        batch_size: of these steps and of the task's batches elsewhere.
        narrow: rank of the adapters (query and value) of the Gram and AIC figures.
        gram_examples: safety prompts behind a basis.
        gram_rank: directions of a basis.
        repeats: of the Gram timings; the mean counts.
        memory_steps: optimizer steps of a memory measurement, each in a process of its own.
    """

    model: str
    task: str
    length: int
    layers: int | None
    wide: int
    modules: tuple[str, ...]
    examples: int
    rank: int
    tolerance: float
    steps: int
    learning_rate: float
    batch_size: int
    narrow: int
    gram_examples: int
    gram_rank: int
    repeats: int
    memory_steps: int

    def as_json(self) -> dict[str, Any]:
        """The setting as plain data."""
        return {**asdict(self), "modules": list(self.modules)}


SMOLLM2 = Setting(
    model=ALIGNED,
    task="codeio",
    length=96,
    layers=4,
    wide=32,
    modules=(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
    examples=4,
    rank=8,
    tolerance=1e-3,
    steps=50,
    learning_rate=3e-4,
    batch_size=2,
    narrow=8,
    gram_examples=32,
    gram_rank=32,
    repeats=2,
    memory_steps=36,
)
SMALL = Setting(
    model=TINY,
    task="tiny",
    length=96,
    layers=None,
    wide=4,
    modules=("q_proj", "v_proj"),
    examples=4,
    rank=3,
    tolerance=1e-3,
    steps=3,
    learning_rate=1e-3,
    batch_size=2,
    narrow=2,
    gram_examples=6,
    gram_rank=4,
    repeats=1,
    memory_steps=2,
)


class Bench:
    """The model and the data, shared by all parts.

    Args:
        setting: the sizes.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        config = RunConfig(
            model=ModelConfig(name=setting.model),
            task=TaskConfig(name=setting.task, max_length=setting.length, min_response_tokens=8),
            batch_size=setting.batch_size,
            steps=setting.steps,
            learning_rate=setting.learning_rate,
            methods=(MethodConfig(name="adamw"),),
            evaluation=EvaluationConfig(  # nothing is evaluated here
                alignment_prompts=1, refusal_prompts=1, over_refusal_prompts=1
            ),
        )
        self.model, tokenizer = load(config.model)
        self.material: Material = material(config, tokenizer)

    def safety_batch(self, count: int) -> dict[str, Tensor]:
        """The first ``count`` safety prompts with their refusals, padded on the left."""
        return self._on_device(collate(self.material.safety[:count], self.material.pad, "left"))

    def task_batches(self, count: int) -> list[dict[str, Tensor]]:
        """Batches of the harmless task."""
        size, pad = self.setting.batch_size, self.material.pad
        device = next(self.model.parameters()).device
        return list(batches(self.material.train, size, count, 0, pad, device))

    @contextmanager
    def narrow(self) -> Iterator[tuple[Any, list[nn.Parameter]]]:
        """The model with small adapters in evaluation mode, and the adapters' parameters."""
        lora = LoraConfig(r=self.setting.narrow, alpha=2 * self.setting.narrow)
        with trainable(self.model, lora, 0) as (model, params):
            yield model.eval(), params

    @contextmanager
    def everything(self) -> Iterator[tuple[Any, list[nn.Parameter]]]:
        """The model itself in evaluation mode, and all of its parameters, likewise."""
        model = self.model.eval().requires_grad_(True)
        yield model, list(model.parameters())

    @contextmanager
    def wide(self) -> Iterator[tuple[Any, list[nn.Parameter]]]:
        """The model's first layers with large adapters, likewise."""
        setting = self.setting
        lora = LoraConfig(r=setting.wide, alpha=setting.wide, target_modules=setting.modules)
        whole = self.model.model.layers
        self.model.model.layers = whole[: setting.layers]
        try:
            with trainable(self.model, lora, 0) as (model, params):
                yield model.eval(), params
        finally:
            self.model.model.layers = whole

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in batch.items()}


def adamw_steps(
    model: nn.Module, params: list[nn.Parameter], taken: list[dict[str, Tensor]], rate: float
) -> None:
    """Train on the task, one step a batch."""
    optimizer = torch.optim.AdamW(params, lr=rate)
    model.train()
    for batch in taken:
        optimizer.zero_grad()
        task_loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


class Scored(nn.Module):
    """The model as peers want it: from a batch to the log-probabilities that the loss looks at.

    Their cross-entropy of these and `targets` is ``loss="causal_lm"`` of our operators. Like ours,
    it computes logits at the refusals only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return log-probabilities, shape ``(tokens, V)``."""
        log_probs, targets = response_log_probs(self.model, batch)
        return log_probs[targets != IGNORE]


def scored_targets(batch: dict[str, Tensor]) -> Tensor:
    """The tokens that `Scored` predicts, shape ``(tokens,)``, in its order."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORE]
