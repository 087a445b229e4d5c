"""PassCounter: what the passes on safety examples cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class PassCounter:
    """What the safety passes cost so far.

    Attributes:
        forward: forward passes (model calls).
        backward: backward passes.
        forward_tokens: tokens, without padding, that went through forward passes.
        backward_tokens: tokens, without padding, that went through backward passes.
        seconds: wall time of all of them.
    """

    forward: int = 0
    backward: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    seconds: float = 0.0

    def count(self, tokens: int, *, backward: bool) -> None:
        """Count one pass over so many tokens: forward, and backward where there was one."""
        self.forward += 1
        self.forward_tokens += tokens
        if backward:
            self.backward += 1
            self.backward_tokens += tokens

    def include(self, other: PassCounter) -> None:
        """Count what another one has counted, its time as well."""
        for name, value in other.as_dict().items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, float]:
        """Return the counters as plain numbers."""
        return asdict(self)
