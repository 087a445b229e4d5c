"""Which safety examples are looked at next, and what is asked of the held ones.

The probe's safety examples are divided once: a few *trial* examples, which span no subspace and
judge whether a step has helped, and all others, which take turns at the refreshes. Held examples
take turns beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.probe import SafetyProbe

# A held example may be brought up to this probability of the whole refusal, or to the one that it
# had when it was first seen: what is refused that rarely needs no protection.
_RARELY_REFUSED = 0.01


@dataclass(frozen=True)
class Look:
    """The examples of one refresh.

    Attributes:
        safety: indices of safety examples in the probe.
        held: positions in the list of held examples.
        indices: all of them as indices in the probe, safety examples first.
    """

    safety: list[int]
    held: list[int]
    indices: list[int]


def held_beside(count: int) -> int:
    """Number of held examples that join ``count`` safety examples: three for four of them."""
    return (3 * count + 2) // 4


class ExampleRota:
    """The order in which safety and held examples take turns.

    Args:
        probe: the examples.
        trial_examples: how many are kept apart as trial examples.
        seed: of the order.

    Attributes:
        trial: indices of the trial examples.
        drawn: safety examples looked at so far.
        held_drawn: held examples looked at so far.
        held_targets: the loss below which each held example must not fall, shape ``(h,)``, float64;
            nan until it was seen for the first time.
    """

    def __init__(self, probe: SafetyProbe, trial_examples: int, seed: int) -> None:
        order = _permutation(len(probe), seed)
        self.trial, self._pool = order[:trial_examples], order[trial_examples:]
        self._held = [len(probe) + i for i in _permutation(probe.held_count, seed)]
        self.held_targets = torch.full((probe.held_count,), math.nan, dtype=torch.float64)
        self.drawn = 0
        self.held_drawn = 0

    def next(self, count: int) -> Look:
        """The examples whose turn it is: ``count`` safety examples, for four of them three held."""
        safety = _turn(self._pool, self.drawn, count)
        places = _turn(range(len(self._held)), self.held_drawn, held_beside(count))
        return Look(safety, places, safety + [self._held[place] for place in places])

    def targets(self, look: Look, losses: Tensor, tokens: Tensor) -> Tensor:
        """Targets of a look's examples, shape ``(q,)``, float64: nan for safety examples.

        Args:
            look: the examples.
            losses: their losses, shape ``(q,)``.
            tokens: their numbers of refusal tokens, shape ``(q,)``.
        """
        seen, lengths = (x[len(look.safety) :].to("cpu", torch.float64) for x in (losses, tokens))
        limits = torch.minimum(seen, -math.log(_RARELY_REFUSED) / lengths)
        known = self.held_targets[look.held]
        targets = torch.full((len(look.indices),), math.nan, dtype=torch.float64)
        targets[len(look.safety) :] = torch.where(known.isnan(), limits, known)
        return targets

    def advance(self, look: Look, targets: Tensor) -> None:
        """End the turn of a look's examples and keep their targets."""
        self.held_targets[look.held] = targets[len(look.safety) :]
        self.drawn += len(look.safety)
        self.held_drawn += len(look.held)


def _turn(items: Sequence[int], position: int, count: int) -> list[int]:
    """The next ``count`` items, each at most once, from the start again after the last."""
    return [items[(position + i) % len(items)] for i in range(min(count, len(items)))]


def _permutation(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()
