"""SafetyCallback in a Hugging Face Trainer: when it restores, and who gets its figures."""

from __future__ import annotations

import pytest
import torch
from tiny_models import safety_batch, tiny_llama, trainable, with_lora
from transformers import Trainer, TrainerCallback, TrainingArguments

from safeopt import ProjectedAdamW, SafetyProbe, safeguard
from safeopt.integrations.transformers import SafetyCallback, install, safety_of


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = (torch.arange(6) + index) % 30 + 4
        return {"input_ids": ids, "labels": ids}


class Stop(TrainerCallback):
    """Ends training in ``on_log``, after every callback has seen the end of the step."""

    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


class Listener(TrainerCallback):
    """Stands for TensorBoard: it is called before the callbacks that the user passes."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(dict(logs))


def protected(model):
    probe = SafetyProbe(model, [safety_batch((3, 6, 4, 9, 5, 7), (2, 4, 3, 1, 5, 2))])
    return ProjectedAdamW(trainable(model), lr=1e-2, probe=probe)


def trainer(tmp_path, optimizer=None, callbacks=(), **options):
    model = with_lora(tiny_llama()) if optimizer is None else optimizer.safety.probe.model
    choices = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],  # older versions do not find them behind PEFT
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **(choices | options)),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        optimizers=(optimizer if optimizer is not None else protected(model), None),
        callbacks=list(callbacks),
    )


def measured_steps(run):
    return {entry.step for entry in safety_of(run.optimizer.optimizer).history}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 5}, {5, 10, 12}),
        ({"save_strategy": "epoch"}, {6, 12}),
        ({"max_steps": 7}, {7}),
    ],
)
def test_every_checkpoint_and_the_end_are_measured(tmp_path, options, steps):
    run = trainer(tmp_path, callbacks=[SafetyCallback()], **options)
    run.train()
    saved = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert saved <= measured_steps(run)
    assert steps <= measured_steps(run)


def test_a_checkpoint_for_the_best_evaluation_is_measured(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best"}
    run = trainer(tmp_path, callbacks=[SafetyCallback()], metric_for_best_model="loss", **options)
    run.train()
    assert list(tmp_path.glob("checkpoint-*")), "the loss falls, so there is a best one"
    assert {3, 6, 9, 12} <= measured_steps(run)


class Save(TrainerCallback):
    """Asks for a checkpoint at a step's end."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 3


def test_a_checkpoint_that_a_later_callback_asks_for_is_measured(tmp_path):
    run = trainer(tmp_path)
    install(run)
    run.add_callback(Save())
    restored = []
    measure = run.optimizer.restore
    run.optimizer.restore = lambda: restored.append(run.state.global_step) or measure()
    run.train()
    assert restored[0] == 3


# Ended before the first checkpoint, there is no best one to be loaded.
BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, BEST])
def test_the_end_is_measured_where_a_callback_ends_training(tmp_path, options):
    callback = SafetyCallback()
    run = trainer(tmp_path, callbacks=[callback, Stop()], **options)
    run.train()
    assert run.state.global_step == 5
    assert callback.last.step == 5


def test_loggers_get_the_figures_after_install(tmp_path):
    """TensorBoard and the like come first in Trainer's list; nobody asks what was added later."""
    listener = Listener()
    run = trainer(tmp_path, callbacks=[listener], max_steps=2)
    callback = install(run)
    run.train()
    assert all({"alignment_loss", "alignment_predicted"} <= set(logs) for logs in listener.heard)
    assert "coupling" in listener.heard[1]
    assert callback.last.step == 2
    assert "alignment_loss" in run.state.log_history[0]


def test_a_safeguarded_optimizer_works_as_well(tmp_path):
    model = with_lora(tiny_llama())
    probe = protected(model).safety.probe
    optimizer = safeguard(torch.optim.SGD(trainable(model), lr=0.1), probe=probe)
    run = trainer(tmp_path, optimizer, [SafetyCallback()], max_steps=2)
    run.train()
    assert measured_steps(run) >= {0, 2}


def test_switched_off_protection_measures_nothing(tmp_path):
    model = with_lora(tiny_llama())
    probe = protected(model).safety.probe
    optimizer = ProjectedAdamW(trainable(model), probe=probe, damping=0)
    run = trainer(tmp_path, optimizer, [SafetyCallback()], max_steps=2)
    run.train()
    assert probe.passes.forward == 0


def test_an_unprotected_optimizer_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[SafetyCallback()])
    run.optimizer = torch.optim.AdamW(trainable(run.model))
    with pytest.raises(TypeError, match="AdamW: SafetyCallback needs a safeopt optimizer"):
        run.train()
    assert run.state.global_step == 0
