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

from safeopt.optim.measurement import finite
from safeopt.probe import SafetyProbe

# A held example may be brought up to this probability of the whole refusal, or to the one that it
# had at the start: what is refused that rarely needs no protection.
_RARELY_REFUSED = 0.01


@dataclass(frozen=True)
class Look:
    """The examples of one refresh.

    Attributes:
        safety: indices of safety examples in the probe.
        held: positions in the order of the held examples.
        indices: all of them as indices in the probe, safety examples first.
    """

    safety: list[int]
    held: list[int]
    indices: list[int]


def require_enough(probe: SafetyProbe, trial_examples: int) -> None:
    """Refuse a probe that has nothing left beside the trial examples.

    Raises:
        ValueError: if it has not.
    """
    if len(probe) <= trial_examples:
        raise ValueError(
            f"trial_examples={trial_examples}: the probe has {len(probe)} safety examples; it "
            f"needs at least {trial_examples + 1}, as the trial examples are kept apart"
        )


def held_beside(count: int) -> int:
    """Number of held examples that join ``count`` safety examples: three for four of them."""
    return (3 * count + 2) // 4


class ExampleRota:
    """The order in which safety and held examples take turns.

    Args:
        probe: the examples.
        trial_examples: how many are kept apart as trial examples.
        seed: of the order.
        most_held: how many of the held examples take turns; None for all.

    Attributes:
        trial: indices of the trial examples.
        held: indices of the held examples in the probe, in the order of their turns.
        drawn: safety examples looked at so far.
        held_drawn: held examples looked at so far.
        held_targets: the loss below which each held example must not fall, shape ``(h,)``, float64,
            in the order of ``held``; nan until `measure` was called.
    """

    def __init__(
        self, probe: SafetyProbe, trial_examples: int, seed: int, most_held: int | None = None
    ) -> None:
        order = _permutation(len(probe), seed)
        self.trial, self._pool = order[:trial_examples], order[trial_examples:]
        self.held = [len(probe) + i for i in _permutation(probe.held_count, seed)[:most_held]]
        self.held_targets = torch.full(
            (len(self.held),), math.nan, dtype=torch.float64, device="cpu"
        )
        self.drawn = 0
        self.held_drawn = 0

    def measure(self, probe: SafetyProbe) -> Tensor:
        """Look at the trial and the held examples before anything moves: one forward pass.

        The model as it is now decides what the held examples' targets are.

        Returns:
            The trial examples' losses, float64, on the CPU.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        losses = probe.values([*self.trial, *self.held]).to("cpu", torch.float64)
        finite(float(losses.sum()))
        trial, held = losses.tensor_split([len(self.trial)])
        self.hold(probe, held)
        return trial

    def hold(self, probe: SafetyProbe, losses: Tensor) -> None:
        """Let the held examples be refused as often as the aligned model refuses them.

        Args:
            probe: the examples.
            losses: the aligned model's on ``held``, shape ``(h,)``, float64.
        """
        rarely = -math.log(_RARELY_REFUSED) / probe.response_tokens(self.held)
        self.held_targets = torch.minimum(losses, rarely)

    def next(self, count: int) -> Look:
        """The examples whose turn it is: ``count`` safety examples, for four of them three held."""
        safety = _turn(self._pool, self.drawn, count)
        places = _turn(range(len(self.held)), self.held_drawn, held_beside(count))
        return Look(safety, places, safety + [self.held[place] for place in places])

    def targets(self, look: Look) -> Tensor:
        """Targets of a look's examples, shape ``(q,)``, float64: nan for safety examples."""
        unbound = torch.full((len(look.safety),), math.nan, dtype=torch.float64, device="cpu")
        return torch.cat([unbound, self.held_targets[look.held]])

    def advance(self, look: Look) -> None:
        """End the turn of a look's examples."""
        self.drawn += len(look.safety)
        self.held_drawn += len(look.held)


def _turn(items: Sequence[int], position: int, count: int) -> list[int]:
    """The next ``count`` items, each at most once, from the start again after the last."""
    return [items[(position + i) % len(items)] for i in range(min(count, len(items)))]


def _permutation(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator, device="cpu").tolist()
