"""When to estimate the safety subspace anew.

At the start of a fine-tuning run the subspace turns quickly (with LoRA, whose B starts at zero,
half of the parameters have no curvature at all before the first steps), later slowly. So: often at
first, then rarely, and earlier than planned when the task pushes hard into the subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RefreshPolicy:
    """Refresh after ``first`` steps, then at intervals that grow up to ``every`` steps.

    Args:
        first: steps before the first refresh after the initial estimate, at least 1.
        growth: each refresh happens at about ``growth`` times the step of the one before, at least
            1; 1 keeps the interval at ``first``.
        every: the longest interval in steps, at least ``first``.
        drift: refresh as soon as the surrogate's alignment loss of everything that the map has
            taken back since the last refresh exceeds this many nats a token; None switches the
            trigger off. The number costs nothing: the coordinates are read at every step.

    Raises:
        ValueError: if an argument is out of its range.

    Examples:
        >>> policy, last = RefreshPolicy.geometric(first=1, growth=2, every=100), 0
        >>> [last := step for step in range(1, 300) if policy.due(step, last)]
        [1, 2, 4, 8, 16, 32, 64, 128, 228]
    """

    first: int = 2
    growth: float = 1.75
    every: int = 200
    drift: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("every", "first"):  # `fixed` knows only the first of them
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name}={value}: expected a whole number of steps")
            if value < 1:
                raise ValueError(f"{name}={value}: a refresh needs a step ({name} >= 1)")
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth={self.growth}: intervals cannot shrink (growth >= 1)")
        if self.every < self.first:
            raise ValueError(f"every={self.every}: shorter than first={self.first}")
        if self.drift is not None and not self.drift > 0:
            raise ValueError(f"drift={self.drift}: expected a positive loss in nats, or None")

    @classmethod
    def fixed(cls, every: int) -> RefreshPolicy:
        """Refresh every ``every`` steps, whatever happens."""
        return cls(first=every, growth=1, every=every, drift=None)

    @classmethod
    def geometric(cls, first: int = 1, growth: float = 2, every: int = 200) -> RefreshPolicy:
        """Refresh at geometrically growing steps, whatever happens."""
        return cls(first=first, growth=growth, every=every, drift=None)

    def due(self, step: int, last: int, drift: float = 0.0) -> bool:
        """Tell whether to refresh after step ``step``.

        Args:
            step: optimizer steps taken so far.
            last: the step of the last refresh (0: the initial estimate).
            drift: the surrogate's loss of what the map has taken back since then, in nats.
        """
        interval = min(self.every, max(self.first, math.ceil((self.growth - 1) * last)))
        return step - last >= interval or (self.drift is not None and drift > self.drift)
