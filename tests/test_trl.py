"""TRL's trainers, protected: what they train, and that a resumed run is the same run."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from documents import HARMFUL, REFUSAL, conversations, preferences
from peft import LoraConfig
from tiny_models import safety_batch, tiny_llama, tiny_tokenizer, trainable
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from safeopt import RefreshPolicy, SafetyProbe
from safeopt.data import safety_batches
from safeopt.integrations import versions
from safeopt.integrations.trainer import SafetyTrainerMixin, protect
from safeopt.integrations.transformers import safety_of, unwrapped


class SafetySFTTrainer(SafetyTrainerMixin, SFTTrainer):
    pass


TRAINERS = {
    "SFT": (SafetySFTTrainer, SFTConfig, conversations),
    "DPO": (DPOTrainer, DPOConfig, preferences),
}


def build(folder, name, **options):
    cls, config, rows = TRAINERS[name]
    choices = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return cls(
        model=tiny_llama(),
        args=config(str(folder), **(choices | options)),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    )


def guarded(folder, name, **options):
    trainer = build(folder, name)
    batches = safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL))
    probe = SafetyProbe(trainer.model, batches)
    protect(trainer, probe, rank=4, refresh=RefreshPolicy.fixed(3), **options)
    return trainer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SFT", {}),
        ("SFT", {"optimizer": "safety-sam", "mode": "two_pass"}),
        ("DPO", {}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name, options):
    whole = guarded(tmp_path, name, **options)
    whole.train()
    resumed = guarded(tmp_path, name, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    history = [safety_of(unwrapped(t.optimizer)).history for t in (whole, resumed)]
    assert history[0] == history[1]
    assert {0, 2, 4} <= {entry.step for entry in history[0]}
    pairs = zip(trainable(whole.model), trainable(resumed.model), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert "alignment_loss" in whole.state.log_history[0]


def test_protection_changes_what_is_trained(tmp_path):
    """The task moves the parameters inside the first subspace; protection does not."""
    moved = {}
    for protected in (False, True):
        trainer = build(tmp_path, "SFT")
        probe = SafetyProbe(trainer.model, [safety_batch()])
        callback = protect(
            trainer, probe, rank=4, refresh=RefreshPolicy.fixed(100), restore_alignment=False,
            mode="project" if protected else "none", trial_examples=1,
        )  # fmt: skip
        seen = []
        callback.on_optimizer_step = lambda *args, seen=seen, **kwargs: seen.append(
            float(position(kwargs["optimizer"]).norm())
        )
        trainer.train()
        moved[protected] = seen[-2]  # the last step is followed by a refresh
    assert moved[False] > 1e-3
    assert moved[True] < 1e-6


def position(optimizer):
    """Where the parameters are inside the subspace."""
    optimizer = unwrapped(optimizer)
    subspace = safety_of(optimizer).subspace
    return subspace.coordinates([p for g in optimizer.param_groups for p in g["params"]])


def test_an_old_trl_is_refused_in_a_sentence(tmp_path, monkeypatch):
    trainer = build(tmp_path, "SFT")
    monkeypatch.setattr(versions, "version", lambda name: "0.9.6")
    with pytest.raises(ImportError, match=r"trl 0\.9\.6 is too old .* needs 0\.16 or newer"):
        protect(trainer, SafetyProbe(trainer.model, [safety_batch()]))
