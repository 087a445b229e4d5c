"""SafetyMonitor in a loop of one's own: its figures, and what it does where alignment is lost."""

# ruff: noqa: F811
from __future__ import annotations

import copy
import logging
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from optimizer_table import OVERWRITING
from quadratic import Quadratic, dense_basis
from quadratic import probe_of as quadratic_probe
from test_restore import HARMFUL, HARMLESS, NEW_ANSWER, REFUSAL, aligned, chats, load  # noqa: F401
from tiny_models import safety_batch, task_step, tiny_llama, trainable, with_lora
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR
from transformers import optimization
from transformers.optimization import Adafactor

from safeopt import PreconditionedSGD, ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM
from safeopt.diagnostics.monitor import SafetyMonitor
from safeopt.diagnostics.observation import Observation, outside
from safeopt.diagnostics.snapshot import Snapshot, lower_learning_rate
from safeopt.optim.state import pack_state


def probe_of(model):
    return SafetyProbe(model, [safety_batch((3, 6, 4, 9, 5, 7) * 2, (2, 4, 3, 1, 5, 2) * 2)])


def dropping(model):
    """The model with dropout, so that its random state matters."""
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def adamw(model, **options):
    return torch.optim.AdamW(trainable(model), lr=1e-2, **options)


def equal(a, b):
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def run_state(model, optimizer, scheduler=None):
    """Everything that decides how a run goes on."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else None,
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        }
    )


def without_passes(state):
    """A state without the counters of safety passes: what was spent stays spent."""
    state = copy.deepcopy(state)
    state["optimizer"].get("safety", {}).pop("passes", None)
    return state


# --- watching ---


@pytest.mark.parametrize("make", [adamw, lambda model: torch.optim.SGD(trainable(model), lr=0.1)])
def test_watching_changes_nothing(make):
    ends = []
    for watched in (False, True):
        model = dropping(with_lora(tiny_llama()))
        optimizer = make(model)
        monitor = SafetyMonitor(optimizer, probe_of(model), every=3, budget=9) if watched else None
        torch.manual_seed(7)
        for step in range(1, 12):
            task_step(model, step)
            optimizer.step()
            if monitor is not None:
                monitor.check(step)
        ends.append(run_state(model, optimizer))
    assert equal(*ends)
    assert [check.step for check in monitor.history] == [3, 4, 7, 8, 11]
    assert "safety" not in ends[1]["optimizer"]


def test_a_protected_run_is_left_as_it_is():
    ends = []
    for watched in (False, True):
        model = dropping(with_lora(tiny_llama()))
        optimizer = ProjectedAdamW(trainable(model), lr=1e-2, probe=probe_of(model))
        monitor = SafetyMonitor(optimizer, probe_of(model), every=3, budget=9) if watched else None
        torch.manual_seed(7)
        for step in range(1, 12):
            task_step(model, step)
            optimizer.step()
            if monitor is not None:
                monitor.check(step)
        state = run_state(model, optimizer)
        state["optimizer"]["safety"]["passes"].pop("seconds")
        ends.append(state)
    assert equal(*ends)


def test_passes_are_as_stated():
    """A measurement is one forward pass on the same examples; every step has none."""
    model = with_lora(tiny_llama())
    probe = probe_of(model)
    policy = RefreshPolicy.geometric(first=4)
    optimizer = ProjectedAdamW(trainable(model), lr=1e-3, probe=probe_of(model), refresh=policy)
    monitor = SafetyMonitor(optimizer, probe, every=5, examples=4, budget=10)
    for step in range(1, 13):
        task_step(model, step)
        optimizer.step()
        monitor.check(step)
    # After the refreshes at 4 and 8; five steps never pass without one.
    assert [check.step for check in monitor.history] == [4, 8]
    assert (probe.passes.forward, probe.passes.backward) == (3, 0)
    assert monitor.check(12, measure=True).alignment_loss == pytest.approx(
        probe.value(monitor._measured)
    )


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def dense(subspace):
    """U as a matrix (n, k)."""
    return torch.cat([block.flatten(1).double() for block in subspace.basis.blocks], dim=1).T


@pytest.mark.parametrize("protected", [False, True])
def test_figures_equal_their_definitions(protected):
    model = with_lora(tiny_llama(dtype=torch.float64))
    params = trainable(model)
    options = {"lr": 1e-3, "weight_decay": 0.0}
    if protected:
        optimizer = ProjectedAdamW(params, probe=probe_of(model), mode="damp", **options)
    else:
        optimizer = torch.optim.AdamW(params, **options)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=1)
    geometry = monitor._observation.geometry
    previous = gradient = None
    for step in range(1, 7):
        task_step(model, step)
        if protected:  # a twin without protection takes the same step from here
            twin = copy.deepcopy(model)
            base = torch.optim.AdamW(trainable(twin), **options)
            state = optimizer.state_dict()
            state.pop("safety")
            base.load_state_dict(copy.deepcopy(state))
            for p, q in zip(trainable(twin), params, strict=True):
                p.grad = q.grad.clone()
        before = flat(params)
        inside_before = None if geometry.subspace is None else geometry.subspace
        optimizer.step()
        if protected:
            base.step()
        after = flat(trainable(twin) if protected else params)
        found = monitor.check(step)
        u = dense(geometry.subspace if inside_before is None else inside_before)
        if geometry.subspace is inside_before:
            update = after - before
            assert found.overlap == pytest.approx(
                float((u.T @ update).norm() / update.norm()), rel=1e-6
            )
            inside = u.T @ flat([p.grad for p in params])
            if gradient is not None:
                weighted = geometry.subspace.eigenvalues.sqrt() * (inside - gradient) / 1e-3
                assert found.coupling == pytest.approx(float(weighted.norm()), rel=1e-6)
            gradient = inside
        else:
            gradient = None
            if inside_before is not None:
                new = geometry.subspace
                captured = (new.eigenvalues * (u.T @ dense(new)).square().sum(0)).sum()
                expected = 1 - float(captured / new.eigenvalues.sum())
                assert found.subspace_drift == pytest.approx(expected, rel=1e-6)
                previous = inside_before
    assert previous is not None, "the subspace was refreshed once"
    assert outside(previous, previous) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("base", OVERWRITING)
def test_the_coupling_is_that_of_the_steps_own_gradients_and_rate(base, with_closure):
    """Not of what the optimizer leaves in the gradients, nor of the rate that a hook sets next."""
    generator = torch.Generator().manual_seed(1)
    slope, *directions = torch.randn(7, 12, generator=generator).double()
    model = Quadratic(torch.linspace(0.5, 3, 12).double().diag(), slope)
    optimizer = OVERWRITING[base](model.parameters(), lr=0.02)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *args: scheduler.step())
    observation = Observation(
        optimizer, quadratic_probe(model, torch.stack(directions)),
        examples=1, every=100, seed=0, on_start=lambda: None,
    )  # fmt: skip
    geometry, compared = observation.geometry, 0
    if base == "schedule-free":
        optimizer.train()
    before = None  # the subspace and what the last step had there
    for step in range(4):
        gradient, subspace = model.task_gradient(model.moved), geometry.subspace
        if with_closure:
            optimizer.step(lambda: model.closure(optimizer))
        else:
            model.closure(optimizer)
            optimizer.step()
        if subspace is not geometry.subspace:  # the next step is the first on a new one
            before = None
            continue
        inside = dense_basis(SimpleNamespace(safety=geometry)).T @ gradient
        if before is not None:
            change = (inside - before) / (0.02 * 0.5 ** (step - 1))
            expected = float((geometry.subspace.eigenvalues.sqrt() * change).norm())
            assert geometry.coupling == pytest.approx(expected, rel=1e-6)
            compared += 1
        before = inside
    assert compared


def test_the_prediction_follows_the_loss():
    """On one subspace the prediction is the last measurement and the surrogate's rise."""
    model = with_lora(tiny_llama())
    optimizer = adamw(model)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=2, budget=100)
    geometry = monitor._observation.geometry
    for step in range(1, 4):
        task_step(model, step)
        optimizer.step()
        found = monitor.check(step)
        if step == 2:
            there = geometry.predicted
    assert found.alignment_loss is None
    last = monitor.history[-1].alignment_loss
    assert found.alignment_predicted == pytest.approx(last + geometry.predicted - there)
    assert found.figures() == {
        "alignment_predicted": found.alignment_predicted,
        "alignment_limit": monitor.reference + 100,
        "coupling": found.coupling,
        "overlap": found.overlap,
        "learning_rate_scale": 1.0,
        "alarm": 0.0,
        "rolled_back": 0.0,
        "stop": 0.0,
    }


def test_nothing_is_known_before_the_first_step():
    model = with_lora(tiny_llama())
    monitor = SafetyMonitor(adamw(model), probe_of(model))
    assert monitor.check(0).figures() == {
        "learning_rate_scale": 1.0,
        "alarm": 0.0,
        "rolled_back": 0.0,
        "stop": 0.0,
    }
    assert monitor.probe.passes.forward == 0


def test_steps_that_move_nothing_are_not_watched():
    model = with_lora(tiny_llama())
    optimizer = adamw(model)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=1)
    optimizer.step()  # no gradients
    assert monitor.check(1).alignment_loss is None
    assert monitor.reference is None


@pytest.mark.parametrize("thaw", [False, True])
def test_parameters_may_be_frozen_or_thawed_on_the_way(thaw):
    """The subspace is then that of the parameters which are trained from there on."""
    model = tiny_llama()
    some = list(model.parameters())[:3]
    for p in some:
        p.requires_grad_(not thaw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=2, budget=9)
    for step in range(1, 8):
        if step == 6:
            for p in some:
                p.requires_grad_(thaw)
        task_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
        found = monitor.check(step)
        spanned = len(dense(monitor._observation.geometry.subspace))
        assert spanned == sum(p.numel() for p in trainable(model))
    assert found.overlap is not None
    predicted = monitor.check(7, measure=True)
    assert predicted.alignment_predicted == pytest.approx(predicted.alignment_loss, abs=0.01)


def measured_at(model, optimizer):
    """Of four steps those at which a monitor that looks at every second one has measured."""
    monitor = SafetyMonitor(optimizer, probe_of(model), every=2, budget=9)
    for step in range(1, 5):
        task_step(model, step)
        optimizer.step()
        monitor.check(step)
    return [check.step for check in monitor.history]


def test_an_optimizer_that_clears_its_gradients_in_the_step_is_watched():
    model = with_lora(tiny_llama())
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())  # before the monitor's
    assert measured_at(model, optimizer) == [2, 4]


def test_a_step_around_the_parents_own_counts_once():
    """Both have the hooks, once the parent's class has been used for itself."""

    class Around(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = tiny_llama()
    torch.optim.SGD(trainable(model), lr=1e-3)
    optimizer = Around(trainable(model), lr=1e-3)
    assert measured_at(model, optimizer) == [2, 4]


@pytest.mark.parametrize("has_gradients", [False, True])
def test_an_optimizer_that_calls_no_closure_is_watched(has_gradients):
    class Ignoring(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    model = tiny_llama()
    optimizer = Ignoring(trainable(model), lr=1e-3)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=1, budget=9)
    if has_gradients:
        task_step(model, 1)
    optimizer.step(lambda: None)
    monitor.check(1)
    assert len(monitor.history) == has_gradients


def test_gradients_that_it_cannot_follow_stop_nobody(caplog):
    model = tiny_llama()
    model.model.embed_tokens.sparse = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = SafetyMonitor(optimizer, probe_of(model), every=1, budget=9)
    for step in range(1, 3):
        task_step(model, step)
        optimizer.step()
        assert monitor.check(step).alignment_loss is not None
    assert "the safety subspace cannot be estimated" in caplog.text


def test_a_protected_step_that_fails_after_resuming_is_watched_nevertheless():
    model = with_lora(tiny_llama())
    first, resumed = (
        ProjectedAdamW(trainable(model), lr=1e-3, probe=probe_of(model), on_refresh_error="warn")
        for _ in range(2)
    )
    task_step(model, 1)
    first.step()
    resumed.load_state_dict(first.state_dict())
    monitor = SafetyMonitor(resumed, probe_of(model), every=1)
    task_step(model, 2)
    trainable(model)[0].grad[:] = math.nan
    with pytest.warns(RuntimeWarning, match="not protected"):
        resumed.step()
    assert monitor.check(2).alarm


def test_it_leaves_an_optimizer_when_it_is_closed():
    model = with_lora(tiny_llama())
    optimizer = adamw(model)
    monitor = SafetyMonitor(optimizer, probe_of(model))
    monitor.close()
    task_step(model, 1)
    optimizer.step()
    assert monitor.probe.passes.forward == 0


# --- acting ---


def spike(model):
    """Parameters far off, as after a bad batch."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainable(model):
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=3)


def climb(model, optimizer, probe, length=3.0):
    """A step of plain SGD straight up the alignment loss."""
    _, gradients = probe.gradient(trainable(model))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    rate = optimizer.param_groups[0]["lr"]
    for p, g in zip(trainable(model), gradients, strict=True):
        p.grad = -g * (length / (rate * norm))
    optimizer.step()


def watched(action, **options):
    model = dropping(tiny_llama())
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3, momentum=0.9)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 100)
    choices = {"budget": 0.1, "every": 4, "others": [scheduler]} | options
    monitor = SafetyMonitor(optimizer, probe_of(model), action=action, **choices)
    return model, optimizer, scheduler, monitor


def go(model, optimizer, scheduler, step):
    task_step(model, step)
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_a_spike_is_acted_on_by_the_next_check(at, caplog):
    """The subspace sees it: the prediction rises or a refresh is due, and the loss is measured."""
    model, optimizer, scheduler, monitor = watched("stop", every=100)
    for step in range(1, at):
        go(model, optimizer, scheduler, step)
        assert not monitor.check(step).alarm
    climb(model, optimizer, monitor.probe)
    found = monitor.check(at)
    assert found.stop
    assert found.alignment_loss > found.alignment_limit
    predicted = found.alignment_predicted
    assert predicted is None or predicted > found.alignment_limit
    assert "stopping" in caplog.text


def test_a_spike_that_is_not_foreseen_is_found_when_it_is_due(monkeypatch):
    monkeypatch.setattr(Observation, "rise", -1.0)
    model, optimizer, scheduler, monitor = watched("stop", every=3)
    for step in range(1, 7):
        go(model, optimizer, scheduler, step)
        if step == 1:
            spike(model)
        if monitor.check(step).stop:
            break
    assert step == 3


def test_warn_goes_on(caplog):
    model, *rest, monitor = watched("warn")
    with caplog.at_level(logging.WARNING, "safeopt"):
        for step in range(1, 6):
            go(model, *rest, step)
            if step == 1:
                spike(model)
            found = monitor.check(step, measure=True)
            assert (found.alarm, found.stop, found.rolled_back) == (True, False, False)
    assert caplog.text.count("alignment loss") == 5
    assert "limit" in caplog.text


def test_warnings_do_not_come_more_often_than_measurements_are_due():
    model, *rest, monitor = watched("warn", every=3)
    alarms = []
    for step in range(1, 10):
        go(model, *rest, step)
        if step == 1:
            spike(model)
        if monitor.check(step, measure=step == 1).alarm:
            alarms.append(step)
    assert alarms == [1, 4, 7]


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_what_was_just_measured_is_told_again_where_it_is_asked_for(action, caplog):
    """A check before saving, after the loop's own at the same step."""
    model, *rest, monitor = watched(action, every=1)
    go(model, *rest, 1)
    spike(model)
    first = monitor.check(1)
    forward = monitor.probe.passes.forward
    again = monitor.check(1, measure=True)
    assert again.alignment_loss == first.alignment_loss
    assert (again.alarm, again.stop) == (first.alarm, first.stop) == (True, action == "stop")
    assert monitor.check(1).alignment_loss is None
    assert monitor.probe.passes.forward == forward
    assert monitor.history == [first]
    assert caplog.text.count("alignment loss") == 1


def test_after_a_rollback_the_checkpoint_s_loss_is_told():
    model, *rest, monitor = watched("rollback", every=1)
    go(model, *rest, 1)
    safe = monitor.check(1)
    go(model, *rest, 2)
    spike(model)
    assert monitor.check(2).rolled_back
    again = monitor.check(2, measure=True)
    assert again.alignment_loss == safe.alignment_loss
    assert (again.alarm, again.rolled_back, again.stop) == (False, False, False)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_rollback_puts_everything_back_exactly(factor):
    model, optimizer, scheduler, monitor = watched("rollback", lr_factor=factor)
    for step in range(1, 5):
        go(model, optimizer, scheduler, step)
        random.random(), np.random.rand()  # noqa: NPY002 - somebody's use of the global state
        monitor.check(step)
    assert [check.step for check in monitor.history] == [4]
    safe = run_state(model, optimizer, scheduler)
    for step in range(5, 7):
        go(model, optimizer, scheduler, step)
        random.random(), np.random.rand()  # noqa: NPY002
    spike(model)
    assert not equal(safe["model"], model.state_dict())
    found = monitor.check(6, measure=True)
    assert found.rolled_back
    assert not found.stop
    assert found.learning_rate_scale == factor
    assert monitor.rollbacks == 1
    now = run_state(model, optimizer, scheduler)
    assert all(p.grad is None for p in model.parameters())
    if factor != 1:
        assert (
            optimizer.param_groups[0]["lr"] == factor * safe["optimizer"]["param_groups"][0]["lr"]
        )
        assert scheduler.get_last_lr() == [factor * safe["scheduler"]["_last_lr"][0]]
        for state in (now, safe):
            state["optimizer"]["param_groups"] = None
            state["scheduler"].update(base_lrs=None, _last_lr=None)
    assert equal(now, safe)


def test_after_a_rollback_the_run_goes_on_as_from_the_checkpoint():
    """The same batches give the same parameters, with the monitor's own subspace, too."""
    ends, views = [], []
    for broken in (False, True):
        model, optimizer, scheduler, monitor = watched("rollback", lr_factor=1.0)
        torch.manual_seed(0)
        for step in range(1, 5):
            go(model, optimizer, scheduler, step)
            monitor.check(step)
        if broken:
            go(model, optimizer, scheduler, 77)
            spike(model)
            assert monitor.check(5, measure=True).rolled_back
        for step in range(5, 12):
            go(model, optimizer, scheduler, step)
            monitor.check(step)
        ends.append(run_state(model, optimizer, scheduler))
        view = pack_state(monitor._observation.geometry)
        view.pop("passes")
        views.append(view)
    assert equal(*ends)
    assert equal(*views)


def test_retries_are_bounded_and_the_model_is_left_safe():
    model, optimizer, scheduler, monitor = watched("rollback", max_rollbacks=2)
    go(model, optimizer, scheduler, 1)
    monitor.check(1, measure=True)
    safe = copy.deepcopy(model.state_dict())
    found = []
    for step in range(2, 5):
        go(model, optimizer, scheduler, step)
        spike(model)
        found.append(monitor.check(step, measure=True))
    assert [check.rolled_back for check in found] == [True, True, True]
    assert [check.stop for check in found] == [False, False, True]
    assert [check.learning_rate_scale for check in found] == [0.5, 0.25, 0.25]
    assert equal(safe, dict(model.state_dict()))


def test_after_the_last_rollback_it_goes_on_saying_stop():
    """A check before saving, after the loop's own: the model is within its limits again."""
    model, *rest, monitor = watched("rollback", every=1, max_rollbacks=0)
    go(model, *rest, 1)
    monitor.check(1)
    go(model, *rest, 2)
    spike(model)
    assert monitor.check(2).stop
    again = monitor.check(2, measure=True)
    assert (again.alarm, again.rolled_back, again.stop) == (False, False, True)
    go(model, *rest, 3)
    assert not monitor.check(3).stop
    assert not monitor.check(3, measure=True).stop


def test_each_rollback_lowers_the_rate_once_more():
    """Also where the safe checkpoint was made after the rate had been lowered."""
    model, optimizer, scheduler, monitor = watched("rollback", every=1, max_rollbacks=9)
    plain = [1e-3 * (1 + math.cos(math.pi * t / 100)) / 2 for t in range(20)]
    taken = 0
    for step, bad in enumerate([0, 1, 1, 0, 0, 1, 0], start=1):
        go(model, optimizer, scheduler, step)
        if bad:
            spike(model)
        found = monitor.check(step)
        taken += not found.rolled_back
        expected = plain[taken] * 0.5**monitor.rollbacks
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert found.rolled_back == bool(bad)


def test_a_model_that_is_no_number_any_more_is_rolled_back():
    model, optimizer, scheduler, monitor = watched("rollback")
    go(model, optimizer, scheduler, 1)
    monitor.check(1, measure=True)
    safe = copy.deepcopy(model.state_dict())
    task_step(model, 2)
    trainable(model)[0].grad[:] = math.nan
    optimizer.step()
    found = monitor.check(2)
    assert math.isnan(found.alignment_loss)
    assert found.rolled_back
    assert equal(safe, dict(model.state_dict()))


def forgetting(aligned, **options):
    """AdamW forgets the refusals in 40 steps; a monitor watches."""
    model = load(aligned)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    probe = SafetyProbe(model, [chats(HARMFUL, REFUSAL, 24, 2 * 10**6)])
    monitor = SafetyMonitor(optimizer, probe, budget=0.05, every=4, **options)
    taken = 0
    for step in range(1, 41):
        optimizer.zero_grad()
        model(**chats(HARMLESS, NEW_ANSWER, 16, step)).loss.backward()
        optimizer.step()
        taken = step
        if monitor.check(step, measure=step == 40).stop:
            break
    return monitor, taken


def test_a_run_that_forgets_ends_within_its_budget(aligned):
    warned, steps = forgetting(aligned)
    assert steps == 40
    assert warned.history[-1].alignment_loss > 10 * warned.history[-1].alignment_limit
    rescued, _ = forgetting(aligned, action="rollback", max_rollbacks=8)
    assert rescued.rollbacks > 0
    end = rescued.probe.value(rescued._measured)
    assert end <= rescued.reference + 0.05
    _, steps = forgetting(aligned, action="stop")
    assert steps < 40


# --- other optimizers ---


def sam(model):
    return SafetySAM(trainable(model), lr=1e-3, probe=probe_of(model))


def projected(model):
    return ProjectedAdamW(trainable(model), lr=1e-3, probe=probe_of(model))


def preconditioned(model):
    return PreconditionedSGD(trainable(model), lr=1e-3, probe=probe_of(model))


def schedule_free(model):
    free = pytest.importorskip("schedulefree")
    optimizer = free.AdamWScheduleFree(trainable(model), lr=1e-3)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("make", [projected, sam, preconditioned, schedule_free])
def test_rollback_of_other_optimizers_is_exact(make):
    model = dropping(tiny_llama())
    optimizer = make(model)
    monitor = SafetyMonitor(
        optimizer, probe_of(model), action="rollback", every=5, budget=0.2, lr_factor=1.0
    )
    for step in range(1, 6):
        task_step(model, step)
        optimizer.step()
        monitor.check(step, measure=step == 5)
    safe = run_state(model, optimizer)
    assert monitor.history[-1].step == 5
    for step in range(6, 8):
        task_step(model, step)
        optimizer.step()
    if make is sam:
        optimizer.eval()
    spike(model)
    if make is sam:
        optimizer.train()
    assert monitor.check(7, measure=True).rolled_back
    assert equal(without_passes(run_state(model, optimizer)), without_passes(safe))
    task_step(model, 8)
    optimizer.step()


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.8, 4, cycle_momentum=False),
    "cosine to a least rate": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=0.2),
    "restarts from a least rate": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 4, eta_min=0.2
    ),
    "sequence with a least rate": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.2),
            lr_scheduler.CosineAnnealingLR(o, 5, eta_min=0.1),
        ],
        [6],
    ),
    "chained with a least rate": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.2)]
    ),
    "average": lambda o: SWALR(o, 0.1, anneal_epochs=7),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_lowered_rate_lowers_the_rest_of_the_schedule(name, tensor):
    rates = []
    for factor in (1.0, 0.5):
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([p], lr=torch.tensor(0.8) if tensor else 0.8)
        scheduler = SCHEDULERS[name](optimizer)
        rates.append([])
        for step in range(10):
            if step == 4:
                lower_learning_rate(optimizer, [scheduler], factor)
            optimizer.step()
            scheduler.step()
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
    plain, lowered = rates
    assert lowered[:4] == plain[:4]
    assert lowered[4:] == pytest.approx([0.5 * rate for rate in plain[4:]])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_last_rate_is_lowered_with_the_rate(name):
    """What is logged before the next step, also by schedulers of other schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.8)
    scheduler = SCHEDULERS[name](optimizer)
    before = scheduler.get_last_lr()[0]
    lower_learning_rate(optimizer, [scheduler], 0.5)
    assert scheduler.get_last_lr() == [0.5 * before] == [optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("least", [0.3, [0.3]])
def test_the_least_rate_of_a_plateau_is_lowered(least):
    """And the smallest change of a rate that it makes."""
    rates = []
    for factor in (1.0, 0.5):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.8)
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, min_lr=least, eps=0.09
        )
        scheduler.step(1.0)
        lower_learning_rate(optimizer, [scheduler], factor)
        assert scheduler.get_last_lr() == [0.8 * factor]
        rates.append([])
        for _ in range(4):  # from 0.8 to 0.4, and to the least, which is 0.1 lower
            scheduler.step(1.0)
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == [0.4, 0.3, 0.3, 0.3]
    assert rates[1] == pytest.approx([0.5 * rate for rate in rates[0]])


@pytest.mark.skipif(
    not hasattr(optimization, "GreedyLR"), reason="this transformers has no GreedyLR"
)
def test_a_schedule_that_starts_again_starts_at_the_lowered_rate():
    rates = []
    for factor in (1.0, 0.5):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.8)
        scheduler = optimization.GreedyLR(
            optimizer, patience=0, factor=0.5, min_lr=0.2, reset_start=2
        )
        rates.append([])
        for step in range(10):
            if step == 3:
                lower_learning_rate(optimizer, [scheduler], factor)
            scheduler.step(1.0)
            rates[-1].append(optimizer.param_groups[0]["lr"])
    plain, lowered = rates
    assert plain[4] == 0.8, "it starts again"
    assert lowered[3:] == pytest.approx([0.5 * rate for rate in plain[3:]])


def test_a_rate_that_groups_share_is_lowered_once():
    """A tensor given as lr is the same one in all groups."""
    rate = torch.tensor(0.8)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=rate)
    lower_learning_rate(optimizer, [], 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.4, 0.4])
    assert optimizer.param_groups[0]["lr"] is rate


def test_an_optimizer_without_a_learning_rate_is_refused_in_a_sentence():
    model = tiny_llama()
    optimizer = Adafactor(model.parameters())
    SafetyMonitor(optimizer, probe_of(model))
    task_step(model, 1)
    with pytest.raises(ValueError, match=r"lr=None: .* give lr a number"):
        optimizer.step()


def test_a_snapshot_can_be_restored_twice():
    model = dropping(tiny_llama())
    optimizer = adamw(model)
    task_step(model, 1)
    optimizer.step()
    taken = Snapshot(model, optimizer)
    safe = run_state(model, optimizer)
    for _ in range(2):
        task_step(model, 2)
        optimizer.step()
        taken.restore()
        assert equal(run_state(model, optimizer), safe)


def test_buffers_that_a_module_replaces_are_put_back():
    """A module may assign another tensor, of another shape, where it registered its buffer."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mean", torch.ones(2))
    model.register_buffer("late", None)
    taken = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.mean, model.late = torch.zeros(3), torch.zeros(1)
    taken.restore()
    assert torch.equal(model.mean, torch.ones(2))
    assert model.late is None


def test_state_of_another_dtype_than_the_parameters_is_put_back_in_it():
    """Adafactor keeps float32 beside bfloat16 parameters; torch casts what it loads."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
    task_step(model, 1)
    optimizer.step()
    safe = run_state(model, optimizer)
    taken = Snapshot(model, optimizer)
    task_step(model, 2)
    optimizer.step()
    taken.restore()
    assert equal(run_state(model, optimizer), safe)


def test_a_run_whose_optimizer_was_given_parameters_is_stopped(caplog):
    """The safe checkpoint does not hold them, and putting back the others would mix two models."""
    model = tiny_llama()
    first, *rest = trainable(model)
    optimizer = torch.optim.AdamW([first], lr=1e-3)
    monitor = SafetyMonitor(optimizer, probe_of(model), action="rollback", budget=1.0, every=1)
    task_step(model, 1)
    optimizer.step()
    assert not monitor.check(1).alarm
    taken = Snapshot(model, optimizer)
    optimizer.add_param_group({"params": rest})
    task_step(model, 2)
    optimizer.step()
    spike(model)
    before = run_state(model, optimizer)
    found = monitor.check(2, measure=True)
    assert found.stop
    assert not found.rolled_back
    assert "stopping" in caplog.text
    with pytest.raises(RuntimeError, match="after add_param_group"):
        taken.restore()
    assert equal(run_state(model, optimizer), before)


def test_a_resumed_run_goes_back_to_where_it_began(caplog):
    """Which is not step 0, as far as anybody who reads the log is concerned."""
    model, optimizer, scheduler, monitor = watched("rollback")
    monitor.load_state_dict({"reference": 9.0, "rollbacks": 0, "scale": 1.0})
    go(model, optimizer, scheduler, 501)
    spike(model)
    assert monitor.check(501, measure=True).rolled_back
    assert "step 501: alignment loss" in caplog.text
    assert "back to the start of this run, learning rate times 0.5" in caplog.text


def test_its_numbers_go_into_a_checkpoint():
    model, optimizer, scheduler, monitor = watched("rollback")
    go(model, optimizer, scheduler, 1)
    spike(model)
    monitor.check(1, measure=True)
    state = monitor.state_dict()
    again, *rest = watched("rollback")
    spike(again)  # the resumed model has drifted; what counts is the first one's loss
    resumed = rest[-1]
    resumed.load_state_dict(state)
    go(again, *rest[:-1], 2)
    found = resumed.check(2, measure=True)
    assert resumed.reference == monitor.reference
    assert resumed._safe is None
    assert found.stop, "there is no safe checkpoint: a model above its limit is none"
    assert resumed.rollbacks == 1
    assert found.learning_rate_scale == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": -1}, "budget=-1"),
        ({"budget": math.nan}, "budget=nan"),
        ({"every": 0}, "every=0"),
        ({"examples": 0}, "examples=0"),
        ({"examples": 12}, "examples=12: the probe has 12"),
        ({"action": "panic"}, 'action="panic"'),
        ({"lr_factor": 0}, "lr_factor=0"),
        ({"lr_factor": 2}, "lr_factor=2"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    model = with_lora(tiny_llama())
    with pytest.raises(ValueError, match=words):
        SafetyMonitor(adamw(model), probe_of(model), **options)


def test_wrong_types_are_named():
    model = with_lora(tiny_llama())
    with pytest.raises(TypeError, match="optimizer=Linear"):
        SafetyMonitor(torch.nn.Linear(1, 1), probe_of(model))
    with pytest.raises(TypeError, match="AcceleratedOptimizer: it wraps another optimizer"):
        SafetyMonitor(Accelerator(cpu=True).prepare(adamw(model)), probe_of(model))
    with pytest.raises(TypeError, match="probe=int"):
        SafetyMonitor(adamw(model), 3)
