"""The choices of one fine-tuning run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeopt.optim import optimizers
from safeopt.optim.config import SafetyConfig

ADAMW = "adamw"  # the unprotected comparison


@dataclass(frozen=True)
class FinetuneConfig:
    """What `safeopt finetune` is told.

    Args:
        model: folder, hub name or GGUF file of an aligned causal chat model.
        train: JSON lines to learn from.
        safety: JSON lines with harmful prompts; where a line has no response, the model's own
            refusal is taken.
        out: folder for everything that is written.
        harmless: JSON lines with harmless prompts that must not be refused; None for none.
        chat_template: file with a Jinja chat template, instead of the tokenizer's own.
        optimizer: a name from `safeopt.optimizers`, or ``"adamw"``.
        full: train all parameters instead of a LoRA adapter.
        lora_rank: rank of the adapter.
        lora_alpha: scale of the adapter times its rank.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup_steps: steps of linear warm-up; then the rate decays linearly to 0.
        epochs: passes over the data, where ``max_steps`` is not given.
        max_steps: optimizer steps; -1 leaves it to ``epochs``.
        batch_size: examples in one pass.
        gradient_accumulation: passes for one step.
        max_length: tokens after which an example is cut.
        rank: directions of the safety subspace.
        budget: accepted rise of the alignment loss, in nats a token.
        save_steps: steps between two checkpoints.
        logging_steps: steps between two lines of the log.
        seed: of everything random.
        resume: continue from the last checkpoint in ``out``.
        overwrite: start again although ``out`` holds a run.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    model: str
    train: Path
    safety: Path
    out: Path
    harmless: Path | None = None
    chat_template: Path | None = None
    optimizer: str = "projected-adamw"
    full: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_length: int = 1024
    rank: int = SafetyConfig.rank
    budget: float = SafetyConfig.budget
    save_steps: int = 100
    logging_steps: int = 1
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        known = [*optimizers(), ADAMW]
        if self.optimizer not in known:
            raise ValueError(f'optimizer="{self.optimizer}": expected one of {", ".join(known)}')
        for name in (
            "lora_rank",
            "lora_alpha",
            "batch_size",
            "gradient_accumulation",
            "rank",
            "save_steps",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("warmup_steps", "weight_decay", "budget"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a positive number")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: expected at least 2 tokens")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps}: expected at least 1, or -1 for epochs")
        if not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: expected a positive number")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: continue the run or start it again, not both")

    def as_dict(self) -> dict[str, Any]:
        """Return the choices as plain values; paths become strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
