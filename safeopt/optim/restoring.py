"""Restoring: whether alignment is lost, the step that brings it back, and how far it is taken.

The step is that of `safeopt.curvature.window`, inside the subspace. The trial examples, which span
no subspace, judge it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.curvature.window import Window, log_odds
from safeopt.losses import refusal_nll
from safeopt.optim.config import SafetyConfig
from safeopt.optim.line_search import backtrack
from safeopt.optim.measurement import finite
from safeopt.probe import SafetyProbe

# Lengths of the restoring step that the line search tries, longest first.
_LENGTHS = (1.0, 0.5, 0.25)
# A safety example that misses its goal by so few nats of log-odds is not lost: near an optimum the
# loss is flat, and a long step, which the task feels, would be taken for next to nothing.
_UNNOTICED = 0.1
# Until the next look examples drift: a refresh brings them back by as much beyond the goal as they
# miss now, up to so many nats of log-odds.
_FIRMER = 1.0


def step_back(
    window: Window, odds: float, probe: SafetyProbe, config: SafetyConfig, *, firmer: bool
) -> Tensor | None:
    """The step inside the subspace that restores the window's lost examples.

    Args:
        window: the latest examples.
        odds: the log-odds to which safety examples return, before the budget.
        probe: their loss.
        config: the budget and the step's damping.
        firmer: whether to aim beyond the goal.

    Returns:
        Shape ``(k,)``; None where no example is lost, or none can be brought back.
    """
    goal = window.losses_at(odds) + config.budget
    if not window.loses(goal, _UNNOTICED):
        return None
    beyond = _FIRMER if firmer and probe.loss is refusal_nll else 0.0
    step = window.restoring_step(goal, config.newton_damping, beyond)
    return step if step.any() else None


def searched(
    subspace: SafetySubspace,
    params: Sequence[Tensor],
    step: Tensor,
    probe: SafetyProbe,
    trial: Sequence[int],
    limit: float,
    before: float | None,
) -> tuple[Tensor, float]:
    """Take as much of a step as the trial examples allow, by a backtracking line search.

    Args:
        subspace: U.
        params: the protected parameters; moved in place.
        step: shape ``(k,)``.
        probe: the examples.
        trial: indices of the trial examples.
        limit: where these have lost nothing: a loss below it need not be improved.
        before: their loss now, None where it is not known.

    Returns:
        The step taken, zero if every length raises the trial loss, and the trial loss there.
    """
    before = finite(probe.value(trial)) if before is None else before
    length, value = backtrack(
        subspace, params, step, _LENGTHS, lambda: probe.value(trial), max(before, limit)
    )
    return (torch.zeros_like(step), before) if value is None else (length * step, value)


def is_lost(loss: float, limit: float, tokens: Tensor) -> bool:
    """Whether a mean loss is noticeably above its limit.

    Measured as for the examples of the window, in log-odds: what restoring takes for nothing,
    rounding among it, is not told as a loss either.

    Args:
        loss: mean over some safety examples, in nats a token.
        limit: of it.
        tokens: the examples' numbers of response tokens, see `Window`; shape ``(q,)``.
    """
    now, least = (log_odds(torch.full_like(tokens, x), tokens) for x in (loss, limit))
    tolerated = torch.where(tokens > 0, _UNNOTICED, 0.0)
    return bool((least - now).mean() > tolerated.mean())
