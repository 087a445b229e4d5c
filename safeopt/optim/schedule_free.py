"""Schedule-free optimizers: which of their points is protected.

They keep two sequences, and the gradient is taken at a third point between them:

    z ← z − η u(∇L(y))          the base sequence, in the optimizer's state
    x ← (1 − w) x + w z         its average: the model that is evaluated and deployed
    y = β x + (1 − β) z         where the model's parameters are in training mode

The alignment that counts is x's, so the pull to the aligned model, the map c → c⁺, the refreshes
and the restoring act on x. z must follow: left alone it would carry the whole unprotected path, and
the average would bring it back into x. It is given x's coordinates, z += U(Uᵀx − Uᵀz), and
gradients are then taken at the same coordinates, Uᵀy = Uᵀx. Outside of the subspace z is left
alone, and x as well but for the pull.

Cost: y → x → y, two combinations of the parameters, and 2·k·n multiplications a step.

Source: Defazio et al. 2024, "The Road Less Scheduled" (arXiv 2405.15682).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.groups import largest_learning_rate


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether the optimizer holds its parameters at y while it trains and at x otherwise."""
    return all("train_mode" in group for group in optimizer.param_groups)


def scheduled_rate(optimizer: Optimizer) -> float | None:
    """The largest learning rate in effect in the step just taken.

    During their warm-up it is less than ``lr``; RAdamScheduleFree begins with steps at 0.

    Returns:
        None for other optimizers, and for those of another package, which do not note it.
    """
    noted = all("scheduled_lr" in group for group in optimizer.param_groups)
    if not (noted and is_schedule_free(optimizer)):
        return None
    return largest_learning_rate(optimizer, "scheduled_lr")


@contextmanager
def at_average(
    optimizer: Optimizer, params: Sequence[Tensor], geometry: SafetyGeometry
) -> Iterator[Callable[[], None]]:
    """The parameters of a schedule-free optimizer are x inside; others are left as they are.

    At the end the parameters are y again if they were before. Where something raises, nothing but
    that is done: one rank may be alone with its error, and z takes all ranks to follow.

    Args:
        optimizer: any optimizer.
        params: its protected parameters.
        geometry: what moves them inside.

    Yields:
        What all ranks must call after they have moved x: z then follows it inside the subspace.

    Raises:
        TypeError: for one with such a mode that does not keep z alone, from which x is computed.
    """
    if not is_schedule_free(optimizer):
        yield _nothing
        return
    states = [optimizer.state[p] for p in params if optimizer.state.get(p)]
    if any("z" not in state or "x" in state for state in states):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: it evaluates at another point than it trains "
            "at, and does not keep the two as the schedule-free optimizers do that can be "
            "protected; use one of these, as schedulefree's AdamWScheduleFree"
        )
    training = optimizer.param_groups[0]["train_mode"]
    if training:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield partial(_follow, optimizer, params, geometry)
    finally:
        if training:
            optimizer.train()  # type: ignore[attr-defined]


def _nothing() -> None:
    """There is no z to follow."""


def _follow(optimizer: Optimizer, params: Sequence[Tensor], geometry: SafetyGeometry) -> None:
    """Give z the coordinates of x."""
    if geometry.subspace is None:
        return
    # A parameter that never had a gradient has no z yet: its x, y and z are the same.
    states = [optimizer.state.get(p, {}) for p in params]
    base = [state.get("z", p) for state, p in zip(states, params, strict=True)]
    moved = [state.get("z", torch.zeros_like(p)) for state, p in zip(states, params, strict=True)]
    basis = geometry.subspace.basis
    basis.expand_into(moved, basis.coordinates(params) - basis.coordinates(base))
