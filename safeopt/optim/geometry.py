"""SafetyGeometry: what all optimizers of this package share.

It decides when to estimate the safety subspace anew, what happens to the parameters after a base
optimizer's step, when lost alignment is restored, and what of it a checkpoint must carry.

One step of the base optimizer, θ → θ', is followed by

    c  = Uᵀθ' − Uᵀθ_r                     k inner products
    c⁺ = map(c)                           arithmetic on k numbers
    θ' += U(c⁺ − c)                       one combination of k directions

and, where `RefreshPolicy` says so, by a refresh: one forward and one backward pass on a few safety
examples, which measures the alignment loss, renews the subspace and, if the loss is above its
reference, takes a damped Newton step back inside the subspace.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safeopt.curvature import surrogate as maps
from safeopt.curvature.basis import inner_products
from safeopt.curvature.subspace import SafetySubspace, updated_subspace
from safeopt.optim.config import SafetyConfig
from safeopt.probe import PassCounter, SafetyProbe

logger = logging.getLogger("safeopt")

# Near the reference the loss is quadratic, ℓ ≈ ½ d²h: its linear model, slope dh, reaches zero half
# way back. So the Gauss-Newton step is taken at twice its length unless the line search objects.
_FULL_LENGTH = 2.0
_LENGTHS = (_FULL_LENGTH, 1.0, 0.5, 0.25)
# A held example's target is its loss before fine-tuning, but never more than the loss at which the
# whole refusal has this probability: what is refused that rarely needs no protection.
_RARELY_REFUSED = 0.05
# Held examples come round again and again, so that each one's loss before fine-tuning is known.
_HELD_POOL = 12
# The reference is a mean over so many safety examples.
_FIRST_LOOK = 4


@dataclass(frozen=True)
class Measurement:
    """One look at the alignment loss.

    Attributes:
        step: optimizer steps taken before it.
        alignment_loss: mean over the examples drawn, before any restoring.
        predicted: what the surrogate expected there; None at the first look.
        restored_to: the surrogate's loss after restoring, or the trial examples' where a line
            search was made; None where nothing was restored.
        examples: number of safety examples drawn.
    """

    step: int
    alignment_loss: float
    predicted: float | None
    restored_to: float | None
    examples: int


class SafetyGeometry:
    """The safety subspace of a run, its schedule and its state.

    Args:
        probe: the safety examples; more than ``trial_examples`` of them.
        config: how the subspace is estimated and used.

    Attributes:
        subspace: the present estimate, None before the first step.
        reference: the alignment loss before fine-tuning, None before the first step.
        history: all measurements, oldest first.
        coupling: γ_t, see `observe_gradient`; None before two steps on one subspace.
        step_count: optimizer steps seen.
        last_refresh: the step after which the subspace was last estimated.

    Raises:
        TypeError: if ``probe`` is not a `SafetyProbe`.
        ValueError: if the probe has too few examples.
    """

    def __init__(self, probe: SafetyProbe, config: SafetyConfig) -> None:
        if not isinstance(probe, SafetyProbe):
            raise TypeError(f"probe={type(probe).__name__}: expected a safeopt.SafetyProbe")
        if config.damping and len(probe) <= config.trial_examples:
            raise ValueError(
                f"probe: {len(probe)} safety examples, of which trial_examples="
                f"{config.trial_examples} are kept apart for the line search; give at least "
                f"{config.trial_examples + 1}"
            )
        self.probe = probe
        self.config = config
        self.subspace: SafetySubspace | None = None
        self.reference: float | None = None
        self.history: list[Measurement] = []
        self.coupling: float | None = None
        self.step_count = 0
        self.last_refresh = 0
        order = _permutation(len(probe), config.seed)
        self._trial, self._pool = order[: config.trial_examples], order[config.trial_examples :]
        held = [len(probe) + i for i in _permutation(probe.held_count, config.seed)]
        self._held_pool = held[:_HELD_POOL]
        self._held_targets = torch.zeros(0, dtype=torch.float64)
        self._drawn = 0
        self._held_drawn = 0
        self._position = torch.zeros(0, dtype=torch.float64)  # c after the last step
        self._first_drift: Tensor | None = None
        self._taken_back = torch.zeros(0, dtype=torch.float64)  # Σ (c − c⁺) since the last refresh
        self._last_gradient: Tensor | None = None

    @property
    def active(self) -> bool:
        """False where ``damping=0`` switches the protection off."""
        return self.config.damping > 0

    @property
    def held_count(self) -> int:
        """Number of held examples in use."""
        return len(self._held_pool)

    @property
    def passes(self) -> PassCounter:
        """Safety passes made so far."""
        return self.probe.passes

    @property
    def measured(self) -> float | None:
        """The last measured alignment loss, in nats a token; None before the first step."""
        return self.history[-1].alignment_loss if self.history else None

    @property
    def predicted(self) -> float | None:
        """The surrogate's alignment loss after the last step; None before the first step."""
        if self.subspace is None:
            return None
        return self.subspace.surrogate.predict(self._position)

    def before_step(self, params: Sequence[Tensor]) -> None:
        """Make the first estimate, at the aligned model, if there is none yet."""
        if self.active and self.subspace is None:
            if self._held_pool:
                self._held_targets = self._held_limits()
            self._estimate(params, _FIRST_LOOK)
            self.reference = self.history[-1].alignment_loss

    def after_step(self, params: Sequence[Tensor], learning_rate: float) -> None:
        """Protect the parameters that the base optimizer has just moved.

        Args:
            params: the protected parameters; changed in place inside the subspace.
            learning_rate: the step's learning rate, for the coupling.
        """
        if self.subspace is None:
            return
        self.step_count += 1
        self.observe_gradient([p.grad for p in params], learning_rate)
        c = self.subspace.coordinates(params)
        mapped = self._map(c)
        self.subspace.shift(params, mapped - c)
        self._taken_back = self._taken_back + (c - mapped)
        self._position = mapped
        if self.config.refresh.due(self.step_count, self.last_refresh, self._drift()):
            self._refresh(params, search=False)

    def restore(self, params: Sequence[Tensor]) -> Measurement:
        """Measure the alignment loss now and, where it exceeds the budget, restore it.

        For the moments that count: before a checkpoint is saved and at the end of training.

        Returns:
            The measurement; the last one if no step was taken since.
        """
        if not self.active:
            raise RuntimeError("restore: damping=0 has switched the protection off")
        if self.subspace is None:
            self.before_step(params)
        elif self.step_count > self.last_refresh:
            self._refresh(params, search=True)
        return self.history[-1]

    def observe_gradient(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """Update the coupling γ_t from the task gradient's coordinates, which cost k numbers.

        The change of Uᵀg from step to step is UᵀH(θ_t − θ_{t−1}); divided by the learning rate and
        weighted with Λ^{1/2} it is the curvature coupling of the Alignment Instability Condition,
        ‖F^{1/2}PHg‖, for a step −ηg. With mini-batches it also holds their noise, and with Adam the
        step is not −ηg: read it as a relative figure.
        """
        assert self.subspace is not None
        coordinates = self.subspace.basis.coordinates(gradients)
        if self._last_gradient is not None and learning_rate > 0:
            change = (coordinates - self._last_gradient) / learning_rate
            self.coupling = float((self.subspace.eigenvalues.sqrt() * change).norm())
        self._last_gradient = coordinates

    def counters(self) -> dict[str, int | float | None]:
        """The plain numbers that a checkpoint carries."""
        return {
            "step_count": self.step_count,
            "last_refresh": self.last_refresh,
            "drawn": self._drawn,
            "held_drawn": self._held_drawn,
            "reference": self.reference,
            "coupling": self.coupling,
        }

    def vectors(self) -> dict[str, Tensor | None]:
        """The k-vectors of the present interval that a checkpoint carries."""
        return {
            "position": self._position,
            "taken_back": self._taken_back,
            "held_targets": self._held_targets,
            "first_drift": self._first_drift,
            "last_gradient": self._last_gradient,
        }

    def resume(
        self,
        state: Mapping[str, Any],
        subspace: SafetySubspace | None,
        vectors: Mapping[str, Tensor | None],
    ) -> None:
        """Continue from a checkpoint's counters, subspace and vectors."""
        self.step_count, self.last_refresh = state["step_count"], state["last_refresh"]
        self._drawn, self._held_drawn = state["drawn"], state["held_drawn"]
        self.reference, self.coupling = state["reference"], state["coupling"]
        self.history = [Measurement(*entry) for entry in state["history"]]
        self.subspace = subspace
        empty = torch.zeros(0, dtype=torch.float64)
        self._position = vectors.get("position", empty)  # type: ignore[assignment]
        self._taken_back = vectors.get("taken_back", empty)  # type: ignore[assignment]
        self._held_targets = vectors.get("held_targets", empty)  # type: ignore[assignment]
        self._first_drift = vectors.get("first_drift")
        self._last_gradient = vectors.get("last_gradient")

    def _map(self, c: Tensor) -> Tensor:
        """The configured map c → c⁺; its target c* is the anchor."""
        assert self.subspace is not None
        surrogate, target = self.subspace.surrogate, torch.zeros_like(c)
        mode = self.config.mode
        if mode == "project":
            return target
        if mode == "damp":
            curvature = surrogate.scale * surrogate.eigenvalues
            relative = curvature / curvature.mean().clamp(min=torch.finfo(c.dtype).tiny)
            return maps.damp(c, target, relative, self.config.damping)
        if mode == "budget":
            assert self.reference is not None
            rise = self.reference + self.config.budget - surrogate.value
            return maps.limit_to_budget(c, surrogate, max(rise, 0.0))
        if self._first_drift is None:
            self._first_drift = c - self._position
        return maps.remove_acceleration(self._position, self._first_drift)

    def _drift(self) -> float:
        """The surrogate's alignment loss of all that the map has taken back, in nats a token."""
        assert self.subspace is not None
        surrogate = self.subspace.surrogate
        return surrogate.predict(self._taken_back) - surrogate.value

    def _refresh(self, params: Sequence[Tensor], *, search: bool) -> None:
        """Measure, renew the subspace and step back where an example of the window is lost."""
        assert self.reference is not None
        steps = self.step_count - self.last_refresh
        self._estimate(params, min(max(steps, 2), self.config.examples))
        if not self.config.restore or self.config.curvature != "fisher":
            return
        assert self.subspace is not None
        limit = self.reference + self.config.budget
        step = self.subspace.restoring_step(limit, self.config.newton_damping)
        if step.any():
            latest = self.history[-1]
            # A refresh that follows soon is the check of this one; a late one makes its own.
            search = search or latest.examples >= 2 * self.config.trial_examples
            lost = latest.alignment_loss > limit
            restored = self._newton_step(params, step, search=search and lost)
            self.history[-1] = replace(latest, restored_to=restored)

    def _estimate(self, params: Sequence[Tensor], count: int) -> None:
        """Draw examples, measure the alignment loss and renew the subspace at ``params``."""
        own = {id(p) for p in self.probe.model.parameters()}
        foreign = sum(id(p) not in own for p in params)
        if foreign:
            raise ValueError(
                f"params: {foreign} of {len(params)} protected parameters do not belong to the "
                "probe's model; give the probe the model that is trained"
            )
        predicted = self.predicted
        count = min(count, len(self._pool))
        safety = [self._pool[(self._drawn + i) % len(self._pool)] for i in range(count)]
        held_count = min(count, len(self._held_pool))
        held = [(self._held_drawn + i) % len(self._held_pool) for i in range(held_count)]
        losses, rows = self.probe.per_example(params, safety + [self._held_pool[i] for i in held])
        targets = torch.full((count + held_count,), torch.nan, dtype=torch.float64)
        targets[count:] = self._held_targets[held].to(targets)
        if self.config.curvature == "random":
            rows = self._random_rows(rows)
        self.subspace = updated_subspace(
            self.subspace,
            params,
            rows,
            losses,
            targets,
            rank=self.config.rank,
            window=self.config.window,
        )
        self._drawn += count
        self._held_drawn += held_count
        self.last_refresh = self.step_count
        self._position = torch.zeros_like(self.subspace.anchor)
        self._taken_back = torch.zeros_like(self.subspace.anchor)
        self._first_drift = self._last_gradient = None
        self.history.append(
            Measurement(
                self.step_count, self.subspace.surrogate.value, predicted, None, len(safety)
            )
        )
        logger.info("safety subspace at step %d: %s", self.step_count, self.history[-1])

    def _held_limits(self) -> Tensor:
        """The losses below which held examples must not fall, shape ``(h,)``, float64."""
        before = self.probe.values(self._held_pool).double()
        lengths = self.probe.response_lengths(self._held_pool).to(before)
        return torch.minimum(before, -math.log(_RARELY_REFUSED) / lengths)

    def _newton_step(self, params: Sequence[Tensor], step: Tensor, *, search: bool) -> float:
        """Step back inside the subspace; returns the alignment loss there."""
        assert self.subspace is not None
        subspace = self.subspace
        length = _FULL_LENGTH
        if search:
            length, change = self._search(params, step)
        else:
            subspace.shift(params, length * step)
            change = subspace.surrogate.predict(length * step) - subspace.surrogate.value
        value = max(subspace.surrogate.value + change, 0.0)
        subspace.rebase(params, length * step, value)
        return value

    def _search(self, params: Sequence[Tensor], step: Tensor) -> tuple[float, float]:
        """Backtracking line search on the trial examples; moves the parameters.

        Returns:
            The accepted length, 0 if no step lowers the loss, and the change of the loss.
        """
        assert self.subspace is not None
        before = self.probe.value(self._trial)
        tried = 0.0
        for length in _LENGTHS:
            self.subspace.shift(params, (length - tried) * step)
            tried = length
            change = self.probe.value(self._trial) - before
            if change < 0:
                break
        else:
            self.subspace.shift(params, -tried * step)
            return 0.0, 0.0
        self.subspace.surrogate = self.subspace.surrogate.with_scale_from(step, [length], [change])
        return length, change

    def _random_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Rows of the same lengths in random directions: the control experiment."""
        generator = torch.Generator().manual_seed(self.config.seed + self._drawn)
        noise = [torch.randn(row.shape, generator=generator).to(row) for row in rows]
        lengths = inner_products(rows, rows).diagonal().sqrt()
        lengths = lengths / inner_products(noise, noise).diagonal().sqrt()
        return [x * lengths.to(x).view(-1, *[1] * (x.dim() - 1)) for x in noise]


def _permutation(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()
