"""SafetyMonitor in a Hugging Face Trainer: exact rollback, figures in every report, resuming."""

from __future__ import annotations

import copy
import json

import pytest
from test_monitor import dropping, equal, probe_of, run_state, spike
from test_trainer import Listener, Rows
from tiny_models import tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from safeopt import ProjectedAdamW
from safeopt.integrations.monitor import install_monitor
from safeopt.integrations.transformers import unwrapped


def trainer(tmp_path, callbacks=(), optimizer=None, **options):
    choices = {
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    model = dropping(tiny_llama()) if optimizer is None else optimizer.safety.probe.model
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **(choices | options)),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


class Recorder(TrainerCallback):
    """Called at a step's end after the monitor: the run's state at some steps."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.states[state.global_step] = run_state(model, unwrapped(optimizer), lr_scheduler)


class Spike(TrainerCallback):
    """Destroys the model at the end of a step, before the monitor looks."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in self.at:
            spike(model)


def watched(tmp_path, at=(), callbacks=(), optimizer=None, trainer_options=(), **options):
    run = trainer(tmp_path, [Spike(at), *callbacks], optimizer, **dict(trainer_options))
    recorder = Recorder()
    watch = install_monitor(run, probe_of(run.model), **({"every": 3, "budget": 0.1} | options))
    run.add_callback(recorder)
    return run, watch, recorder


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_rollback_is_exact(tmp_path, factor, protected):
    optimizer = None
    if protected:
        model = dropping(tiny_llama())
        optimizer = ProjectedAdamW(model.parameters(), lr=1e-3, probe=probe_of(model))
    options = {"action": "rollback", "lr_factor": factor, "every": 1}
    run, watch, recorder = watched(tmp_path, (9,), optimizer=optimizer, **options)
    run.train()
    alarms = [check.step for check in watch.monitor.history if check.rolled_back]
    safe = max(check.step for check in watch.monitor.history if check.step < 9)
    assert alarms == [9]
    states = [copy.deepcopy(recorder.states[step]) for step in (safe, 9)]
    for state in states:
        if protected:
            state["optimizer"]["safety"].pop("passes")
        if factor != 1:
            for group in state["optimizer"]["param_groups"]:
                group["lr"] = group["initial_lr"] = None
            state["scheduler"].update(base_lrs=None, _last_lr=None)
    assert equal(*states)
    before, after = (recorder.states[step]["scheduler"]["_last_lr"][0] for step in (safe, 9))
    assert after == factor * before
    assert run.state.global_step == 10, "the data go on"


def test_training_ends_where_the_monitor_stops(tmp_path):
    run, watch, _ = watched(tmp_path, (4,), action="stop", every=1)
    run.train()
    assert run.state.global_step == 4
    assert watch.last.stop


def test_retries_are_bounded(tmp_path):
    options = {"action": "rollback", "every": 1, "max_rollbacks": 2}
    run, watch, _ = watched(tmp_path, range(3, 11), **options)
    run.train()
    assert run.state.global_step == 5
    assert watch.monitor.rollbacks == 3
    assert watch.monitor.history[-1].stop


def test_checkpoints_and_the_end_are_measured(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 7}
    run, watch, _ = watched(tmp_path, every=100, budget=9, trainer_options=saving)
    run.train()
    assert {5, 7} <= {check.step for check in watch.monitor.history}


def test_the_best_checkpoint_is_measured_before_it_is_saved(tmp_path):
    saving = {
        "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "max_steps": 7,
        "metric_for_best_model": "loss",
    }  # fmt: skip
    run, watch, _ = watched(tmp_path, every=100, budget=9, trainer_options=saving)
    run.train()
    assert {3, 6, 7} <= {check.step for check in watch.monitor.history}


def test_reporters_get_the_figures(tmp_path):
    """TensorBoard and the like come first in Trainer's list; the figures are there nevertheless."""
    listener = Listener()
    run, watch, _ = watched(tmp_path, callbacks=[listener], every=2, budget=9)
    run.train()
    steps = [logs for logs in listener.heard if "loss" in logs][1:]  # the first has a rate of 0
    assert {"monitor/alignment_limit", "monitor/learning_rate_scale"} <= set(steps[0])
    assert {"monitor/coupling", "monitor/overlap", "monitor/subspace_drift"} <= set(steps[-1])
    measured = [check.alignment_loss for check in watch.monitor.history]
    assert steps[-1]["monitor/alignment_loss"] == pytest.approx(measured[-1])
    assert "monitor/alignment_loss" in run.state.log_history[-2]


@pytest.mark.parametrize("restoring", [False, True])
def test_a_resumed_run_keeps_the_reference(tmp_path, restoring):
    saving = {"save_strategy": "steps", "save_steps": 5}
    run, watch, _ = watched(tmp_path, (3,), every=1, action="rollback", trainer_options=saving)
    run.train()
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    numbers = saved["stateful_callbacks"]["safeopt.MonitorCallback"]
    assert numbers == {"reference": watch.monitor.reference, "rollbacks": 1, "scale": 0.5}
    saving["restore_callback_states_from_checkpoint"] = restoring  # by Trainer, in its own way
    again, resumed, _ = watched(tmp_path, every=1, action="rollback", trainer_options=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.monitor.reference == watch.monitor.reference
    assert resumed.monitor.rollbacks == 1
    ends = [run_state(r.model, unwrapped(r.optimizer), r.lr_scheduler) for r in (run, again)]
    assert equal(ends[0]["model"], ends[1]["model"])
    assert ends[0]["scheduler"] == ends[1]["scheduler"]


def test_a_run_that_is_repeated_keeps_the_reference(tmp_path, monkeypatch):
    """The model has been trained by then; so has one whose batch was too large in the middle."""
    run, watch, _ = watched(tmp_path, every=1, trainer_options={"auto_find_batch_size": True})
    step, failures = run.training_step, [RuntimeError("CUDA out of memory.")]

    def training_step(*args, **kwargs):
        if run.state.global_step == 4 and failures:
            aligned.append(watch.monitor.reference)
            raise failures.pop()
        return step(*args, **kwargs)

    aligned = []
    monkeypatch.setattr(run, "training_step", training_step)
    run.train()
    assert watch.monitor.history[-1].step == 10
    run.train()
    assert watch.monitor.reference == aligned[0]
    assert not unwrapped(run.optimizer)._optimizer_step_post_hooks, "nobody follows it any more"


def test_wrong_options_are_named_before_the_first_step(tmp_path):
    run, _, _ = watched(tmp_path, action="panic")
    with pytest.raises(ValueError, match='action="panic"'):
        run.train()
    assert run.state.global_step == 0
