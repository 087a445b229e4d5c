"""Observation: what the safety subspace says about a run, step by step.

A protected optimizer brings its subspace. Beside any other one a `SafetyGeometry` of its own is
kept with ``mode="none"``: it is estimated and refreshed by the same code that protects, and moves
nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from safeopt.curvature.refresh import RefreshPolicy
from safeopt.curvature.subspace import SafetySubspace
from safeopt.optim.base_step import BaseStep
from safeopt.optim.config import SafetyConfig
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.groups import protected_parameters
from safeopt.optim.protection import closure_of, is_inert, with_closure
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")


class Observation:
    """Follows an optimizer by its step hooks and changes nothing.

    Args:
        optimizer: protected or not; of `SafetySAM` the base optimizer, whose parameters are θ.
        probe: safety examples for a subspace of its own.
        examples: how many of them are kept out of that subspace.
        every: steps between two values of ``overlap``, each of which needs a copy of the
            parameters while the step is taken.
        seed: of the order of the safety examples.
        on_start: called once, before the first step that moves parameters.

    Attributes:
        geometry: the subspace, its schedule and the coupling.
        steps: steps seen that moved parameters.
        overlap: ‖Uᵀu‖/‖u‖ of the base optimizer's step u, None before the first.
        subspace_drift: share of the safety curvature outside of the subspace of the estimate
            before, at the last refresh; None before the first.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        probe: SafetyProbe,
        *,
        examples: int,
        every: int,
        seed: int,
        on_start: Callable[[], None],
    ) -> None:
        geometry: SafetyGeometry | None = getattr(optimizer, "safety", None)
        self._own = geometry is None or not geometry.active
        if geometry is None or self._own:
            config = SafetyConfig(
                mode="none",
                restore_alignment=False,
                elastic=0.0,
                trial_examples=examples,
                # Nothing is restored: fewer looks do than a protected run needs.
                refresh=RefreshPolicy(first=4, growth=2.0),
                seed=seed,
            )
            geometry = SafetyGeometry(probe, config)
        self.geometry = geometry
        self.steps = 0
        self.overlap: float | None = None
        self.subspace_drift: float | None = None
        self._every = every
        self._on_start = on_start
        self._started = False
        self._params: list[Tensor] = []
        self._spanned: list[Tensor] = []  # the parameters of a subspace of its own
        self._moving = False  # whether the present step moves parameters
        self._step = BaseStep()
        self._subspace: SafetySubspace | None = None  # before the present step
        self._copies: list[Tensor] | None = None  # of the parameters, likewise
        self._marked: tuple[SafetySubspace | None, float] = (None, 0.0)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def close(self) -> None:
        """Follow the optimizer no longer."""
        for handle in self._handles:
            handle.remove()

    def mark(self) -> None:
        """The alignment loss was measured here: `rise` counts from now on."""
        self._marked = (self.geometry.subspace, self.geometry.predicted or 0.0)

    @property
    def rise(self) -> float | None:
        """The surrogate's rise of the alignment loss since `mark`; None on another subspace."""
        subspace, before = self._marked
        predicted = self.geometry.predicted
        if predicted is None or subspace is not self.geometry.subspace:
            return None
        return predicted - before

    def save(self) -> Any:
        """What `load` needs. Nothing is copied but k-vectors: a subspace that moves nothing stays.

        None where the optimizer's own state holds the geometry.
        """
        geometry = self.geometry
        if not self._own:
            return None
        history = [[*vars(entry).values()] for entry in geometry.history]
        vectors = {k: None if v is None else v.clone() for k, v in geometry.vectors().items()}
        state = {**geometry.counters(), "history": history}
        return state, geometry.subspace, vectors, self._spanned

    def load(self, saved: Any) -> None:
        """Go back to where `save` was called."""
        if saved is not None:
            state, subspace, vectors, self._spanned = saved
            self.geometry.resume(
                state, subspace, {k: None if v is None else v.clone() for k, v in vectors.items()}
            )

    @_disable_dynamo
    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        params = protected_parameters(optimizer)
        closure = closure_of(args, kwargs)
        self._moving = not is_inert(optimizer, params, closure)
        if not self._moving:
            return None
        self._params = params
        if self._own:
            if [*map(id, params)] != [*map(id, self._spanned)]:
                # Some were frozen or added meanwhile: the next subspace is that of these.
                self.geometry.subspace, self._spanned = None, params
            self.geometry.before_step(params)
        if not self._started:
            self._started = True
            self._on_start()
        self._subspace = self.geometry.subspace
        if (self.steps + 1) % self._every == 0:
            self._copies = [p.detach().clone() for p in params]
        self._begins(optimizer)
        if closure is None:
            return None

        def evaluate() -> Any:
            self._step.forget()  # no copy beside a backward pass
            loss = closure()
            self._begins(optimizer)
            return loss

        return with_closure(args, kwargs, evaluate)

    @_disable_dynamo
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._moving:
            return
        self._moving = False  # a subclass's step around its parent's has these hooks twice
        if self._own:
            rate, gradients = self._step.ends(optimizer, self._params)
            if not rate > 0:  # a warm-up may begin with 0
                return
        self.steps += 1
        try:
            if self._own:
                self.geometry.after_step(self._params, rate, gradients=gradients)
            self._compare()
        except Exception as error:  # who only watches stops nobody: a look at the loss will tell
            logger.warning("the safety subspace cannot be estimated (%s)", error)
            self._marked = (None, 0.0)  # what was predicted is not of this step
        self._subspace = self._copies = None

    def _begins(self, optimizer: Optimizer) -> None:
        """Decided before the step: the optimizer, or a hook, may clear the gradients in it."""
        self._moving = any(p.grad is not None for p in self._params)
        if self._own and self._moving:
            self._step.begins(optimizer, self._params)

    def _compare(self) -> None:
        """The overlap of the step, or how far the subspace has turned by its refresh."""
        before, now = self._subspace, self.geometry.subspace
        if before is not None and now is not None:
            if now is not before:
                self.subspace_drift = outside(before, now)
            elif self._copies is not None:
                self.overlap = self._ratio(now, self._copies)

    def _ratio(self, subspace: SafetySubspace, before: Sequence[Tensor]) -> float | None:
        """‖Uᵀu‖/‖u‖ of the base optimizer's step, from the step that is left of it.

        A protected step is u, with the pull to the aligned model where there is one, and another
        part inside the subspace; outside they are equal.
        """
        inside = self.geometry.update
        if inside is None:  # no step was protected since a protected optimizer was resumed
            return None
        moved = [p.detach() - copy for p, copy in zip(self._params, before, strict=True)]
        whole = sum(float(m.to(torch.float64).square().sum()) for m in moved)
        left = float(subspace.basis.coordinates(moved).square().sum())
        pushed = float(inside.square().sum())
        length = math.sqrt(max(whole - left, 0.0) + pushed)
        return math.sqrt(pushed) / length if length > 0 else None


def outside(before: SafetySubspace, now: SafetySubspace) -> float:
    """Share of the present curvature outside of an earlier subspace, in [0, 1].

    1 − Σ_j λ_j ‖U_beforeᵀu_j‖² / Σ_j λ_j: 0 where the subspace has not turned. Cost: 2·k²·n
    operations.
    """
    total = now.eigenvalues.sum()
    if now.rank == 0 or not float(total) > 0:
        return 0.0
    kept = before.basis.inner(now.basis).square().sum(0)
    share = float((now.eigenvalues * kept).sum() / total)
    return min(max(1 - share, 0.0), 1.0)
