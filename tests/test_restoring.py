"""What counts as lost, and what a user is told of it."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from optimizer_table import NEVER, build, run

from safeopt.curvature.window import Window
from safeopt.losses import refusal_nll
from safeopt.optim.config import SafetyConfig
from safeopt.optim.restoring import is_lost, searched, step_back

TOKENS = torch.tensor([4.0, 4.0, 20.0], dtype=torch.float64)


def loss_at(limit, missed, tokens):
    """The mean token loss with so many nats of log-odds less than a loss of ``limit``."""
    odds = -math.log(math.expm1(limit * tokens)) - missed
    return math.log1p(math.exp(-odds)) / tokens


@pytest.mark.parametrize("limit", [0.002, 0.07, 1.5])
def test_a_mean_loss_is_lost_by_more_than_a_tenth_of_log_odds(limit):
    tokens = TOKENS[:2]
    assert not is_lost(limit, limit, tokens)
    assert not is_lost(loss_at(limit, 0.09, 4.0), limit, tokens)
    assert is_lost(loss_at(limit, 0.11, 4.0), limit, tokens)
    assert not is_lost(0.9 * limit, limit, tokens)


def test_a_difference_in_the_last_digits_is_none():
    assert not is_lost(0.0745, 0.0743, TOKENS)
    assert is_lost(0.2, 0.0743, TOKENS)


def test_a_loss_that_is_no_likelihood_is_taken_as_it_is():
    tokens = torch.zeros(3, dtype=torch.float64)
    assert is_lost(0.0745, 0.0743, tokens)
    assert not is_lost(0.0743, 0.0743, tokens)


@pytest.mark.parametrize(("missing", "told"), [(0.05, False), (0.5, True)])
def test_restore_tells_what_is_left_of_a_rise_that_matters(missing, told, monkeypatch, caplog):
    model, optimizer = build("ProjectedAdamW", refresh=NEVER)
    run(model, optimizer, 1)
    safety = optimizer.safety
    tokens = safety.probe.response_tokens(safety.rota.trial)
    reference = safety._trial_reference
    after = reference + missing / float(tokens.mean())  # about so many nats of log-odds
    losses = iter([reference + 4 * (after - reference), *[after] * 20])
    monkeypatch.setattr(safety.probe, "value", lambda *args: next(losses))
    with caplog.at_level(logging.WARNING, logger="safeopt"):
        optimizer.restore()
    assert is_lost(after, reference, tokens) == told
    assert ("25% of the rise is left" in caplog.text) == told
    assert (f"set budget to {after - reference:.2g}" in caplog.text) == told


def other_loss(model, batch):
    """Any loss that is not the refusals' negative log-likelihood."""


def window_of(coefficient, loss):
    """One safety example whose loss is taken as it is."""
    one = torch.ones(1, dtype=torch.float64)
    return Window(coefficient * one.view(1, 1), loss * one, 0 * one, math.nan * one)


@pytest.mark.parametrize("firmer", [False, True])
@pytest.mark.parametrize("loss", [refusal_nll, other_loss])
def test_the_step_back_leads_to_the_goal_and_the_budget(loss, firmer):
    """Beyond it by what is missing, where a refresh asks for that and the loss is of refusals."""
    config, probe = SafetyConfig(budget=0.1, newton_damping=0.25), SimpleNamespace(loss=loss)
    step = step_back(window_of(1.0, 1.0), -0.5, probe, config, firmer=firmer)
    missing = 0.8 if firmer and loss is refusal_nll else 0.4
    assert step.tolist() == pytest.approx([-missing / 1.25])
    assert step_back(window_of(1.0, 0.59), -0.5, probe, config, firmer=firmer) is None
    # Lost, but without a gradient there is no way back.
    assert step_back(window_of(0.0, 1.0), -0.5, probe, config, firmer=firmer) is None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("before", "losses", "length"),
    [
        (1.0, [0.5], 1.0),
        (1.0, [1.1, 0.9], 0.5),
        (1.0, [1.1, 1.0, 0.99], 0.25),
        (1.0, [1.1, 1.0, 1.0], 0.0),
        (0.1, [0.15], 1.0),  # nothing was lost, and nothing is
        (0.1, [0.25, 0.19], 0.5),
    ],
)
def test_as_much_of_a_step_is_taken_as_the_trial_examples_allow(before, losses, length, known):
    def shift(params, change):
        params[0].add_(change)

    measured = iter(losses if known else [before, *losses])
    probe = SimpleNamespace(value=lambda trial: next(measured))
    start, step = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, -8.0]).double()
    params = [start.clone()]
    taken, value = searched(
        SimpleNamespace(shift=shift), params, step, probe, [0], 0.2, before if known else None
    )
    assert torch.equal(taken, length * step)
    assert torch.equal(params[0], start + length * step)
    assert value == (losses[-1] if length else before)
    assert list(measured) == []


def test_a_trial_loss_that_is_not_finite_takes_no_step():
    probe = SimpleNamespace(value=lambda trial: math.nan)
    with pytest.raises(FloatingPointError, match="the safety loss is nan"):
        searched(SimpleNamespace(), [], torch.ones(1), probe, [0], 0.2, None)
