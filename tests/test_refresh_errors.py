"""Whatever goes wrong inside a refresh, it happens as a whole or not at all."""

import copy
import math

import pytest
import torch
from optimizer_table import build, copies, equal, names, probe_of, run
from tiny_models import task_step, tiny_llama, trainable
from transformers.optimization import Adafactor

from safeopt import RefreshPolicy, SafetyProbe, safeguard
from safeopt.curvature.subspace import SafetySubspace

EVERY = RefreshPolicy.fixed(2)
# Restoring is always needed and never near the next look, so that a refresh has all its parts.
OPTIONS = {"refresh": EVERY, "held": True, "budget": 0.0, "lr": 3e-2}


class Failure(Exception):
    pass


ERRORS = {
    "any exception": Failure("in the middle"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "no more memory": MemoryError(),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.fixture(autouse=True)
def searched_refreshes(monkeypatch):
    monkeypatch.setattr("safeopt.optim.geometry._SOON", 0)


def passes_of_a_refresh(name):
    """How many safety passes the refresh after the second step makes."""
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 1)
    before = optimizer.safety.passes.forward
    run(model, optimizer, 1, start=1)
    return optimizer.safety.passes.forward - before


def fail_at(monkeypatch, call, error):
    """Let the safety pass number ``call``, from now on, raise after it was made."""
    original, made = SafetyProbe._run, [0]

    def failing(self, *args, **kwargs):
        losses = original(self, *args, **kwargs)
        made[0] += 1
        if made[0] == call:
            if isinstance(error, BaseException):
                raise error
            return losses * error
        return losses

    monkeypatch.setattr(SafetyProbe, "_run", failing)


def picture(model, optimizer):
    """Everything but the clock and the count of passes that were made."""
    state = copy.deepcopy(optimizer.state_dict())
    del state["safety"]["passes"]
    return copies(model.parameters()), state


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return torch.equal(left.nan_to_num(), right.nan_to_num())
    return left == right


def without_its_refresh(name):
    """A run of two steps whose second refresh is not made."""
    model, optimizer = build(name, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefreshPolicy, "due", lambda *arguments: False)
        run(model, optimizer, 2)
    return picture(model, optimizer)


@names
def test_ctrl_c_at_the_end_of_the_first_estimate(name, monkeypatch):
    """It is made again by the next step, with all that belongs to it."""

    def interrupted(*args):
        raise KeyboardInterrupt

    expected = build(name, **OPTIONS)
    run(*expected, 2)
    model, optimizer = build(name, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("safeopt.optim.geometry.log_odds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, optimizer, 1)
    assert optimizer.safety.subspace is None
    run(model, optimizer, 2)
    assert same(picture(model, optimizer), picture(*expected))


@names
def test_a_refresh_that_fails_anywhere_leaves_the_step_alone(name, monkeypatch):
    """At every one of its passes: parameters, optimizer and geometry are as after the step."""
    expected, count = without_its_refresh(name), passes_of_a_refresh(name)
    assert count >= 3  # gradients, the trial examples, at least one length of the search
    for call in range(1, count + 1):
        model, optimizer = build(name, **OPTIONS)
        run(model, optimizer, 1)
        with monkeypatch.context() as patch:
            fail_at(patch, call, Failure("in the middle"))
            with pytest.raises(Failure):
                run(model, optimizer, 1, start=1)
        assert same(picture(model, optimizer), expected)
        run(model, optimizer, 1, start=2)  # it is tried again after the next step
        assert optimizer.safety.last_refresh == 3
    for error in ERRORS.values():
        model, optimizer = build(name, **OPTIONS)
        run(model, optimizer, 1)
        with monkeypatch.context() as patch:
            fail_at(patch, 2, error)
            with pytest.raises(type(error)):
                run(model, optimizer, 1, start=1)
        assert same(picture(model, optimizer), expected)


@names
def test_a_refresh_that_fails_after_a_step_without_a_search_leaves_the_step_alone(
    name, monkeypatch
):
    """As all early refreshes are: the parameters have moved, and nothing has looked at them."""
    monkeypatch.undo()
    expected = without_its_refresh(name)
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 1)
    before, moved = copies(model.parameters()), []

    def failing(subspace, params, *arguments):
        moved.append(not equal(params, before))
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(SafetySubspace, "rebase", failing)
        with pytest.raises(Failure):
            run(model, optimizer, 1, start=1)
    assert moved == [True]
    assert same(picture(model, optimizer), expected)


@names
@pytest.mark.parametrize("kind", ["any exception", "out of memory", "nan"])
def test_with_warn_training_goes_on_with_one_warning(name, kind, monkeypatch):
    expected = without_its_refresh(name)
    model, optimizer = build(name, **OPTIONS, on_refresh_error="warn")
    run(model, optimizer, 1)
    with monkeypatch.context() as patch:
        fail_at(patch, 1, ERRORS.get(kind, math.nan))
        with pytest.warns(RuntimeWarning, match="its refresh is postponed") as caught:
            run(model, optimizer, 1, start=1)
    assert len(caught) == 1
    assert same(picture(model, optimizer), expected)
    run(model, optimizer, 1, start=2)
    assert optimizer.safety.last_refresh == 3


@names
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_safety_loss_that_is_not_finite(name, value, monkeypatch):
    expected = without_its_refresh(name)
    for call in (1, 2):
        model, optimizer = build(name, **OPTIONS)
        run(model, optimizer, 1)
        with monkeypatch.context() as patch:
            fail_at(patch, call, value)
            with pytest.raises(FloatingPointError, match=r"the safety loss is (nan|inf)"):
                run(model, optimizer, 1, start=1)
        assert same(picture(model, optimizer), expected)


@names
def test_the_first_estimate_raises_whatever_the_policy(name, monkeypatch):
    """Nothing has been trained, and the next attempt measures the aligned model."""
    for policy in ("raise", "warn"):
        model, optimizer = build(name, **OPTIONS, on_refresh_error=policy)
        before = copies(model.parameters())
        for value in (Failure(), math.nan):
            for call in (1, 2):
                task_step(model, 0)
                with monkeypatch.context() as patch:
                    fail_at(patch, call, value)
                    with pytest.raises((Failure, FloatingPointError)):
                        optimizer.step()
                assert equal(model.parameters(), before)
                assert not optimizer.state_dict()["state"]
        run(model, optimizer, 3)
        plain, reference = build(name, **OPTIONS)
        run(plain, reference, 3)
        assert equal(model.parameters(), plain.parameters())


@names
def test_restoring_before_a_checkpoint_happens_as_a_whole_or_not_at_all(name, monkeypatch):
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 3)
    before, passes = picture(model, optimizer), optimizer.safety.passes.forward
    for call in (1, 2, 3):
        with monkeypatch.context() as patch:
            fail_at(patch, call, Failure())
            with pytest.raises(Failure):
                optimizer.restore()
        assert same(picture(model, optimizer), before)
    assert optimizer.safety.passes.forward > passes
    twin, other = build(name, **OPTIONS)
    run(twin, other, 3)
    assert optimizer.restore() == other.restore()
    assert equal(trainable(model), trainable(twin))


def test_an_optimizer_that_picks_its_own_rates_is_refused_before_its_first_step():
    """How far a step may go decides when to look again: with lr=None nobody knows."""
    model = tiny_llama(layers=1)
    with pytest.raises(ValueError, match=r"lr=None: .* give lr a number .* relative_step=False"):
        safeguard(Adafactor(model.parameters()), probe_of(model))
    groups = [{"params": trainable(model), "lr": 1e-2}, {"params": [torch.zeros(1)], "lr": None}]
    groups[1]["protect"] = False
    optimizer = safeguard(Adafactor(groups, relative_step=False), probe_of(model), rank=8)
    run(model, optimizer, 2)
    assert optimizer.safety.step_count == 2
