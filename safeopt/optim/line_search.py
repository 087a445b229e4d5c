"""Backtracking line search along a direction inside the safety subspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.distributed import Layout, local


def backtrack(
    subspace: SafetySubspace,
    params: Sequence[Tensor],
    step: Tensor,
    lengths: Sequence[float],
    measure: Callable[[], float],
    limit: float,
) -> tuple[float, float | None]:
    """Move the parameters by the first length after which a loss is below a limit.

    Args:
        subspace: U.
        params: the protected parameters; moved in place.
        step: the whole step, shape ``(k,)``.
        lengths: shares of it, longest first.
        measure: the loss at the present parameters; one call for each length that is tried.
        limit: what the loss must be below.

    Returns:
        The length, and the loss there; 0 and None where no length is good enough, and the
        parameters are where they were.

    Memory: a copy of the parameters. Shorter steps go from there, not back from the longer one: in
    bfloat16 (θ + s) − s is not θ, and would keep up to a third of a step that was refused.
    """
    start = [local(p).detach().clone() for p in params]
    for length in lengths:
        subspace.shift(params, length * step)
        value = measure()
        if value < limit:
            return length, value
        _put(params, start)
    Layout.of(params).publish()
    return 0.0, None


@torch.no_grad()
def _put(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        local(p).copy_(value)
