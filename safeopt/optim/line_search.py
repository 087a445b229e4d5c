"""Backtracking line search along a direction inside the safety subspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.distributed import Layout, local
from safeopt.optim.copies import copied, put_back


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

    Memory: a copy of the parameters (`safeopt.optim.copies`): shorter steps go from there, not back
    from the longer one, which would keep up to a third of a step that was refused.
    """
    start = copied(map(local, params))
    for length in lengths:
        subspace.shift(params, length * step)
        value = measure()
        if value < limit:
            return length, value
        put_back(map(local, params), start)
    Layout.of(params).publish()
    return 0.0, None
