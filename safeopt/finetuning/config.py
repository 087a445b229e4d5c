"""The choices of one fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safeopt.finetuning.inputs import InputConfig
from safeopt.optim import optimizers
from safeopt.optim.config import SafetyConfig

ADAMW = "adamw"  # the unprotected comparison


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(InputConfig):
    """What `safeopt finetune` is told, beside the `InputConfig`.

    Args:
        out: folder for everything that is written.
        optimizer: a name from `safeopt.optimizers`, or ``"adamw"``.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup_steps: steps of linear warm-up; then the rate decays linearly to 0.
        epochs: passes over the data, where ``max_steps`` is not given.
        max_steps: optimizer steps; -1 leaves it to ``epochs``.
        gradient_accumulation: passes for one step.
        rank: directions of the safety subspace.
        budget: accepted rise of the alignment loss, in nats a token.
        elastic: strength of the pull to the aligned model, see `safeopt.optim.elastic`; 0 for none.
        save_steps: steps between two checkpoints.
        logging_steps: steps between two lines of the log.
        resume: continue from the last checkpoint in ``out``.
        overwrite: start again although ``out`` holds a run.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    out: Path
    optimizer: str = "projected-adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    epochs: float = 1.0
    max_steps: int = -1
    gradient_accumulation: int = 1
    rank: int = SafetyConfig.rank
    budget: float = SafetyConfig.budget
    elastic: float = SafetyConfig.elastic
    save_steps: int = 100
    logging_steps: int = 1
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [*optimizers(), ADAMW]
        if self.optimizer not in known:
            raise ValueError(f'optimizer="{self.optimizer}": expected one of {", ".join(known)}')
        for name in (
            "gradient_accumulation",
            "rank",
            "save_steps",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("warmup_steps", "weight_decay", "budget", "elastic"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected a positive, finite number"
                )
        for name in ("weight_decay", "elastic"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}: expected at least 1, or -1 for epochs")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: continue the run or start it again, not both")
