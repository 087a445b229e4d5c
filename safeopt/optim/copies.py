"""Copies of parameters, and how they are written back.

A move that is taken back by the opposite move leaves a rounding error, in bfloat16 one as large as
the move itself: (θ + s) − s is not θ. So θ is copied before, and copied back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Their values now, which later writes leave alone. Memory: as much as the tensors take."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put_back(tensors: Iterable[Tensor], values: Sequence[Tensor]) -> None:
    """Write what was `copied` into the same tensors, in place and with no part in autograd.

    Args:
        tensors: of a DTensor its local part, best by a generator: made in here, no gradient is
            recorded for it either.
        values: one for each of them.
    """
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
