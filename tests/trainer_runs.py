"""What the processes of the Trainer tests do: ordinary runs, on one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate_runs import let_it_shard
from distributed_runs import ranks, whole
from documents import HARMFUL, REFUSAL
from tiny_models import tiny_llama, tiny_tokenizer, trainable, with_lora
from transformers import Trainer, TrainingArguments

from safeopt import RefreshPolicy, SafetyProbe
from safeopt.data import safety_batches
from safeopt.integrations.trainer import SafetyTrainerMixin, protect
from safeopt.integrations.transformers import safety_of, unwrapped

STEPS = 20
SAVED = 9  # the step whose checkpoint is resumed
BATCH = 4  # of all ranks together
KINDS: dict[str, dict[str, Any]] = {
    "safeguard": {},
    "ProjectedAdamW": {"optimizer": "projected-adamw"},
    "lookahead": {"optimizer": "safety-sam", "rho": 0.1},
    "two_pass": {"optimizer": "safety-sam", "rho": 0.1, "mode": "two_pass"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {},
    "fsdp2": {
        "fsdp": "full_shard",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero2": {
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
        }
    },
}


class Rows(torch.utils.data.Dataset):
    """A next-token task."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * (index + 3)) % 30 + 4
        return {"input_ids": ids, "labels": ids.clone()}


class SafetyTrainer(SafetyTrainerMixin, Trainer):
    """A Trainer that can make two passes."""


def build(folder: Path, layout: str, kind: str) -> Trainer:
    """A protected Trainer on a model in float64, so that only the layout of a run can matter."""
    accumulation = 2 if kind == "two_pass" else 1
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // accumulation // ranks(),
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=SAVED,
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        label_names=["labels"],  # older versions do not find them behind PEFT
        **LAYOUTS[layout],
    )
    if layout == "fsdp2":
        let_it_shard()
    model = with_lora(tiny_llama(dtype=torch.float64))
    trainer = SafetyTrainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        processing_class=tiny_tokenizer(),
    )
    batches = safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL))
    # All of the window's directions, as in `distributed_runs`.
    options = {"rank": 32, "refresh": RefreshPolicy.fixed(6), **KINDS[kind]}
    protect(trainer, SafetyProbe(model, batches), **options)
    return trainer


def train(folder: Path, layout: str, kind: str, resume: Path | None = None) -> dict[str, Any]:
    """A whole run, or the rest of one; what all layouts must agree on."""
    trainer = build(folder, layout, kind)
    checkpoint = None if resume is None else str(resume / f"checkpoint-{SAVED}")
    trainer.train(resume_from_checkpoint=checkpoint)
    return outcome(trainer)


def train_twice(folder: Path, layout: str, kind: str) -> dict[str, Any]:
    """A second run after the first, with another engine: as auto_find_batch_size begins again."""
    trainer = build(folder, layout, kind)
    trainer.train()
    first = safety_of(unwrapped(trainer.optimizer)).reference
    trainer.model_wrapped = trainer.model
    trainer.train()
    return {**outcome(trainer), "first": first}


def outcome(trainer: Trainer) -> dict[str, Any]:
    safety = safety_of(unwrapped(trainer.optimizer))
    return {
        "params": [whole(p) for p in trainable(trainer.model)],
        "wrapped": type(trainer.model_wrapped).__name__,
        "steps": safety.step_count,
        "reference": safety.reference,
        "refreshes": [entry.step for entry in safety.history],
        "backward_tokens": safety.passes.backward_tokens,
        "losses": [(entry.alignment_loss, entry.restored_to or 0.0) for entry in safety.history],
    }
