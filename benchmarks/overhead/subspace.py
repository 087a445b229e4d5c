"""A safety subspace of full rank that stays as it is while steps are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safeopt import RefreshPolicy

RANK = 32
PULL = 0.5  # strength of the pull to the aligned model, as in the demo
STEPS = 2 * RANK  # a refresh looks at one example for every two steps
# One refresh, with as many examples as the subspace has directions; the next is never due.
ONE_REFRESH: dict[str, Any] = {
    "rank": RANK,
    "examples": RANK,
    "window": RANK,
    "restore_alignment": False,
    "basis": "dense",
    "refresh": RefreshPolicy(first=STEPS, growth=1e6, every=10**9, drift=None),
}


class Comparison(NamedTuple):
    """What is timed.

    Attributes:
        runs: steps by the name of their optimizer.
        parameters: how many each moves.
        rank: directions of the smallest subspace among them.
    """

    runs: Mapping[str, Callable[[], object]]
    parameters: int
    rank: int


def fill_subspace(optimizer: Any, params: Sequence[Tensor]) -> int:
    """Take steps of zero gradients, which move nothing, until the refresh has been made.

    Returns:
        The number of directions found: `RANK`, unless the examples' gradients span fewer.
    """

    def closure() -> Tensor:
        for p in params:
            p.grad = torch.zeros_like(p)
        return torch.zeros(())

    for _ in range(STEPS):
        optimizer.step(closure)
    return int(optimizer.safety.subspace.rank)
