"""Interval: what the steps between two looks have done inside the safety subspace.

Each step of the base optimizer moves the coordinates c = Uᵀ(θ − θ_r), and a map c → c⁺
(`safeopt.curvature.surrogate`) takes back what alignment does not allow. A look at the safety
examples renews U and θ_r, and with them begins a new interval. All vectors are k numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature import surrogate as maps
from safeopt.curvature.surrogate import Surrogate
from safeopt.optim.config import SafetyConfig


@dataclass
class Interval:
    """The time since the last look.

    Attributes:
        position: c after the last step, shape ``(k,)``, float64.
        taken_back: Σ (c − c⁺), shape ``(k,)``, float64.
        first_drift: c of the first step, before the map; None where ``mode`` does not ask for it.
        last_gradient: Uᵀg of the last step, shape ``(k,)``; None where there was none.
    """

    position: Tensor
    taken_back: Tensor
    first_drift: Tensor | None = None
    last_gradient: Tensor | None = None

    @classmethod
    def at(cls, anchor: Tensor) -> Interval:
        """A new one, with the parameters at an anchor of shape ``(k,)``."""
        return cls(torch.zeros_like(anchor), torch.zeros_like(anchor))

    @classmethod
    def empty(cls) -> Interval:
        """That of a run without a subspace."""
        return cls.at(torch.zeros(0, dtype=torch.float64, device="cpu"))

    def mapped(
        self, c: Tensor, surrogate: Surrogate, config: SafetyConfig, reference: float
    ) -> Tensor:
        """The configured map c → c⁺; its target c* is the anchor.

        Args:
            c: after the base optimizer's step, shape ``(k,)``.
            surrogate: the alignment loss around the anchor.
            config: which map.
            reference: the alignment loss before fine-tuning.

        Returns:
            Shape ``(k,)``; ``c`` itself where nothing is to be moved.
        """
        target = torch.zeros_like(c)
        if config.mode == "none":
            return c
        if config.mode == "project":
            return target
        if config.mode == "damp":
            mean = surrogate.eigenvalues.mean().clamp(min=torch.finfo(c.dtype).tiny)
            return maps.damp(c, target, surrogate.eigenvalues / mean, config.damping)
        if config.mode == "budget":
            rise = reference + config.budget - surrogate.value
            return maps.limit_to_budget(c, surrogate, max(rise, 0.0))
        if self.first_drift is None:
            self.first_drift = c - self.position
        return maps.remove_acceleration(self.position, self.first_drift)

    def advance(self, c: Tensor, mapped: Tensor) -> None:
        """End a step that led to ``c`` and was mapped; both of shape ``(k,)``."""
        self.taken_back = self.taken_back + (c - mapped)
        self.position = mapped

    def drift(self, surrogate: Surrogate) -> float:
        """The surrogate's rise where all steps would have led without the map, in nats a token."""
        return surrogate.predict(self.position + self.taken_back) - surrogate.value
