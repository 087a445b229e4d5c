"""An ordinary Trainer run, told before what awaits it and watched by one callback."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from documents import HARMFUL, REFUSAL, aligned_llama, write_files
from tiny_models import tiny_llama, tiny_tokenizer, trainable, with_lora
from transformers import Trainer, TrainingArguments

from safeopt import SafetyProbe
from safeopt.data import safety_batches
from safeopt.integrations.watch import VARIABLE, WatchCallback


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 3)) % 30 + 4
        return {"input_ids": ids, "labels": ids.clone()}


def train(folder, callbacks, *, resume=None, **options):
    choices = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    trainer = Trainer(
        model=with_lora(aligned_llama(), random_b=False),
        args=TrainingArguments(str(folder), **(choices | options)),
        train_dataset=Rows(),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [p.detach().clone() for p in trainable(trainer.model)]


@pytest.fixture
def prompts(tmp_path):
    write_files(tmp_path)
    return tmp_path / "prompts.jsonl"


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "safeopt" and r.levelno >= 30]


def test_one_environment_variable_tells_and_watches(tmp_path, prompts, monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, str(prompts))
    caplog.set_level(logging.WARNING)
    callback = WatchCallback(every=2, budget=0.0, examples=8)
    trainer, watched = train(tmp_path / "a", [callback])
    said = messages(caplog)
    assert said[0] == (
        f"check before training, {callback.diagnosis.verdict.risk}: "
        f"{callback.diagnosis.verdict.text}"
    )
    assert callback.diagnosis.evidence.task_losses.numel() == 4
    steps = [check.step for check in callback.monitor.history]
    assert {2, 4} <= set(steps)
    assert any("monitor/alignment_loss" in entry for entry in trainer.state.log_history)
    _, plain = train(tmp_path / "b", [])
    assert all(map(torch.equal, watched, plain)), "watching draws nothing and changes nothing"


def test_nothing_happens_without_the_variable(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(VARIABLE, raising=False)
    callback = WatchCallback()
    trainer, _ = train(tmp_path, [callback])
    assert callback.monitor is callback.diagnosis is None
    assert messages(caplog) == []
    assert not any("monitor" in name for entry in trainer.state.log_history for name in entry)


def test_a_resumed_run_keeps_its_reference_and_is_not_diagnosed_again(tmp_path, prompts):
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = WatchCallback(prompts, every=1, batches=0)
    _, whole = train(tmp_path, [first], **saving)
    again = WatchCallback(prompts, every=1)
    _, resumed = train(tmp_path, [again], resume=str(tmp_path / "checkpoint-2"), **saving)
    assert again.diagnosis is None
    assert again.monitor.reference == first.monitor.reference
    ends = [callback.monitor.history[-1] for callback in (first, again)]
    assert ends[0].step == ends[1].step == 4
    assert ends[0].alignment_loss == ends[1].alignment_loss
    assert all(map(torch.equal, whole, resumed))


def test_watching_may_begin_when_a_run_is_resumed(tmp_path, prompts):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, [WatchCallback()], **saving)
    callback = WatchCallback(prompts, every=1)
    train(tmp_path, [callback], resume=str(tmp_path / "checkpoint-2"), **saving)
    assert [check.step for check in callback.monitor.history] == [3, 4]


def test_the_look_at_the_data_draws_nothing_that_the_run_would_draw(tmp_path, prompts, monkeypatch):
    def drawn(self, index, plain=Rows.__getitem__):
        row = plain(self, index)
        row["labels"][: random.randrange(3)] = -100
        row["labels"][-1] += np.random.randint(3)  # noqa: NPY002 - what a data set may do
        return row

    monkeypatch.setattr(Rows, "__getitem__", drawn)
    _, watched = train(tmp_path / "a", [WatchCallback(prompts, every=2, budget=9)])
    _, plain = train(tmp_path / "b", [])
    assert all(map(torch.equal, watched, plain))


def test_a_resumed_run_is_measured_on_the_first_runs_refusals(tmp_path, prompts, monkeypatch):
    """The model has drifted: what it says by now is no refusal."""
    text = prompts.read_text(encoding="utf-8").replace(REFUSAL, "")
    prompts.write_text(text, encoding="utf-8")
    monkeypatch.setattr("safeopt.safety_examples.is_refusal", lambda answer: REFUSAL in answer)
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 16, "learning_rate": 0.1}
    first, again = (WatchCallback(prompts, every=1, batches=0) for _ in range(2))
    train(tmp_path, [first], **saving)
    assert first.monitor.history[-1].alignment_loss > 10 * first.monitor.reference
    train(tmp_path, [again], resume=str(tmp_path / "checkpoint-12"), **saving)
    ends = [callback.monitor.history[-1] for callback in (first, again)]
    assert ends[0].step == ends[1].step == 16
    assert ends[0].alignment_loss == ends[1].alignment_loss
    assert first.monitor.reference == again.monitor.reference
    prompts.write_text('{"prompt": "Something else"}\n' * 12, encoding="utf-8")
    with pytest.raises(ValueError, match="other prompts than those of the run that is resumed"):
        train(tmp_path, [again], resume=str(tmp_path / "checkpoint-12"), **saving)


@pytest.mark.parametrize("restoring", [False, True])
def test_a_resumed_run_is_watched_as_it_was_asked_for(tmp_path, prompts, restoring):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, [WatchCallback(prompts, batches=0)], **saving)
    saving["restore_callback_states_from_checkpoint"] = restoring  # by Trainer, in its own way
    again = WatchCallback(prompts, every=1)
    train(tmp_path, [again], resume=str(tmp_path / "checkpoint-2"), **saving)
    assert again.monitor.history[-1].step == 4


def test_a_run_that_is_repeated_is_measured_on_the_same_refusals(
    tmp_path, prompts, caplog, monkeypatch
):
    text = prompts.read_text(encoding="utf-8").replace(REFUSAL, "")
    prompts.write_text(text, encoding="utf-8")
    monkeypatch.setattr("safeopt.safety_examples.is_refusal", lambda answer: REFUSAL in answer)
    callback = WatchCallback(prompts, every=1)
    trainer, _ = train(tmp_path, [callback])
    first, probe = callback.monitor.reference, callback.monitor.probe
    trainer.train()
    assert callback.monitor.reference == first
    assert callback.monitor.probe is probe
    assert sum("check before training" in said for said in messages(caplog)) == 1


def test_a_check_that_fails_keeps_no_run_from_starting(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (Rows()[index] for index in range(8))

    model = with_lora(tiny_llama())
    probe = SafetyProbe(model, safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL)))
    callback = WatchCallback(probe, every=1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=Stream(),
        callbacks=[callback],
    )
    trainer.train()
    assert "check before training failed (TypeError: train_dataset=" in messages(caplog)[0]
    assert callback.monitor.history[-1].step == 2


def test_wrong_arguments_are_named(tmp_path, prompts):
    with pytest.raises(ValueError, match="batches=1: an interval needs two"):
        WatchCallback(prompts, batches=1)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl: there is no such file"):
        train(tmp_path, [WatchCallback(tmp_path / "nothing.jsonl")])
