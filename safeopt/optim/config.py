"""SafetyConfig: the choices behind the protection, checked once and then fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from safeopt.curvature.bases import Storage
from safeopt.curvature.refresh import RefreshPolicy
from safeopt.optim.examples import held_beside

Mode = Literal["project", "damp", "acceleration", "budget", "none"]
Curvature = Literal["fisher", "random"]


@dataclass(frozen=True)
class SafetyConfig:
    """How the safety subspace is estimated and used. The defaults need no tuning.

    Args:
        rank: the largest number of directions k, at least 1.
        mode: the map applied after each step, see `safeopt.curvature.surrogate`; ``"none"`` leaves
            refreshes and restoring alone.
        damping: strength of the protection, at least 0. 0 switches it off: no safety pass is made
            and the base optimizer runs as if it were alone. In mode ``"damp"`` it is κ = η/τ per
            mean eigenvalue; the other modes only distinguish zero from positive.
        budget: accepted rise of a safety example's loss, in nats a token, at least 0, over that
            of the firmest refusal among the examples seen before fine-tuning. Examples above it are
            brought back at a refresh, beyond it by as much as they miss, at most one nat of
            log-odds, since they drift until the next one; `restore` brings them back to it.
            ``mode="budget"`` keeps the surrogate below it in between.
        refresh: when to estimate anew.
        examples: new safety examples at one refresh, at most, at least 1; three held ones join four
            of them. The first look and refreshes in quick succession take fewer; `restore` takes up
            to twice as many, for what it leaves is saved.
        window: the number of latest examples whose gradients span the subspace, at least
            ``examples``; a look at more than that replaces all older ones.
        newton_damping: δ of the restoring step, see `safeopt.curvature.window`; positive.
        restore_alignment: step back where alignment was lost; False leaves projection alone.
        trial_examples: safety examples kept apart for the line search, at least 1.
        curvature: ``"fisher"``, or ``"random"``: the control experiment, a random subspace of equal
            rank that knows nothing of safety (nothing is restored with it).
        basis: how U is stored: ``"dense"``, ``"int8"``, ``"factored"``, ``"compressed"``, or
            ``"auto"``, which picks by size, see `safeopt.curvature.bases`.
        elastic: τ of a pull back to the aligned model, see `safeopt.optim.elastic`, at least 0; 0
            leaves it out. With ``curvature="random"``, and with factored and compressed bases,
            which are there to save the memory that it takes, there is none, and a warning says so.
        seed: for the order of the safety examples and the random control.

    Raises:
        ValueError: if an argument is out of its range.
    """

    rank: int = 32
    mode: Mode = "project"
    damping: float = 1.0
    budget: float = 0.0
    refresh: RefreshPolicy = field(default_factory=RefreshPolicy)
    examples: int = 4
    window: int = 32
    newton_damping: float = 0.1
    restore_alignment: bool = True
    trial_examples: int = 4
    curvature: Curvature = "fisher"
    basis: Storage = "auto"
    elastic: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "examples", "window", "trial_examples", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected a whole number")
        _at_least("rank", self.rank, 1, "the safety subspace needs at least one direction")
        one_of("mode", self.mode, get_args(Mode))
        _at_least("damping", self.damping, 0, "0 switches the protection off")
        if self.damping == math.inf:
            raise ValueError(f'damping={self.damping}: for a hard projection use mode="project"')
        _at_least("budget", self.budget, 0, "the accepted rise of the alignment loss")
        _at_least("examples", self.examples, 1, "a refresh needs a safety example")
        _at_least("window", self.window, self.examples, "it holds the examples of a refresh")
        number = isinstance(self.newton_damping, (int, float))
        if not (number and 0 < self.newton_damping < math.inf):
            raise ValueError(f"newton_damping={self.newton_damping}: expected a positive number")
        _at_least("trial_examples", self.trial_examples, 1, "the line search needs an example")
        one_of("curvature", self.curvature, get_args(Curvature))
        one_of("basis", self.basis, get_args(Storage))
        _at_least("elastic", self.elastic, 0, "0 leaves the pull out")
        if self.elastic == math.inf:
            raise ValueError(
                f"elastic={self.elastic}: to keep parameters where they are, freeze them"
            )
        if not isinstance(self.refresh, RefreshPolicy):
            raise TypeError(f"refresh={self.refresh!r}: expected a RefreshPolicy")

    @property
    def restore_examples(self) -> int:
        """The largest number of new safety examples in one look, which is one of `restore`."""
        return 2 * self.examples

    @property
    def largest_rank(self) -> int:
        """The largest number of directions that the window or one look's examples can span."""
        look = self.restore_examples + held_beside(self.restore_examples)
        return min(self.rank, max(self.window, look))


def _at_least(name: str, value: float, low: float, why: str) -> None:
    if not (isinstance(value, (int, float)) and value >= low):
        raise ValueError(f"{name}={value}: {why} ({name} >= {low})")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices, naming the argument.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{name}="{value}": expected one of {listed}')
