"""What counts as lost, and what a user is told of it."""

import logging
import math

import pytest
import torch
from optimizer_table import NEVER, build, run

from safeopt.optim.restoring import is_lost

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
