"""HeldParameters: parameters that are held at θ + ε for a while and return to θ bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.optim.copies import copied, put_back


class _Held(NamedTuple):
    param: Tensor
    copy: Tensor  # of the parameter in θ
    version: int  # the parameter's version counter at θ + ε


class HeldParameters:
    """Moves parameters inside the safety subspace and returns them.

    θ is kept as a copy and copied back (`safeopt.optim.copies`). Memory: one number for each
    parameter while held.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []

    def __bool__(self) -> bool:
        return bool(self._held)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles: version counters belong to the original's tensors."""
        return {"held": [(p, copy, p._version == version) for p, copy, version in self._held]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._held = [
            _Held(p, copy, p._version if unwritten else -1) for p, copy, unwritten in state["held"]
        ]

    @torch.no_grad()
    def hold(self, subspace: SafetySubspace, params: Sequence[Tensor], change: Tensor) -> None:
        """Move the parameters to θ + U·change; where that raises, they are θ again.

        Args:
            subspace: U.
            params: the protected parameters, at θ.
            change: shape ``(k,)``.
        """
        copies = copied(params)
        try:
            subspace.shift(params, change)
        except BaseException:
            put_back(params, copies)
            raise
        self._held = [_Held(p, copy, p._version) for p, copy in zip(params, copies, strict=True)]

    @torch.no_grad()
    def release(self, *, overwrite: bool = False) -> int:
        """Return the parameters to θ.

        Args:
            overwrite: also those that were written to since; otherwise they stay as written.

        Returns:
            The number of parameters left as they were written.
        """
        written = 0
        for held in self._held:
            unwritten = overwrite or held.param._version == held.version
            if unwritten and held.param.shape == held.copy.shape:  # else resized in between
                held.param.copy_(held.copy)
            else:
                written += 1
        self._held = []
        return written
