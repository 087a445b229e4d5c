"""SafetyGeometry: what all optimizers of this package share.

It decides when to estimate the safety subspace anew, what happens to the parameters after a base
optimizer's step, when lost alignment is restored, and what of it a checkpoint must carry.

One step of the base optimizer, θ → θ', is followed by

    θ' += w ⊙ (θ₀ − θ')                   if asked for: a pull back, `safeopt.optim.elastic`
    c  = Uᵀθ' − Uᵀθ_r                     k inner products
    c⁺ = map(c)                           arithmetic on k numbers
    θ' += U(c⁺ − c)                       one combination of k directions

and, where `RefreshPolicy` says so, by a refresh: one forward and one backward pass on a few safety
examples, which measures the alignment loss, renews the subspace and, where examples are lost,
takes a damped Gauss-Newton step back inside the subspace (`safeopt.curvature.window`), a little
beyond the goal, since they drift until the next refresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from safeopt.curvature import surrogate as maps
from safeopt.curvature.basis import coordinates_together
from safeopt.curvature.subspace import SafetySubspace
from safeopt.curvature.window import log_odds
from safeopt.losses import refusal_nll
from safeopt.optim.config import SafetyConfig
from safeopt.optim.elastic import ElasticPull
from safeopt.optim.estimate import basis_kind, estimate, pulls
from safeopt.optim.examples import ExampleRota, require_enough
from safeopt.optim.line_search import backtrack
from safeopt.optim.measurement import Measurement, finite
from safeopt.optim.transaction import whole_or_not_at_all
from safeopt.passes import PassCounter
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

# Lengths of the restoring step that the line search tries, longest first.
_LENGTHS = (1.0, 0.5, 0.25)
# A safety example that misses its goal by so few nats of log-odds is not lost: near an optimum the
# loss is flat, and a long step, which the task feels, would be taken for next to nothing.
_UNNOTICED = 0.1
# A step that is not followed by another look within so many steps is searched, not just taken.
_SOON = 16
# `restore` repeats measuring and stepping back so often where once was not enough.
_ROUNDS = 1
# Until the next look examples drift: a refresh brings them back by as much beyond the goal as they
# miss now, up to so many nats of log-odds.
_FIRMER = 1.0
# So many held examples take turns at most: all of them are measured at the start.
_MOST_HELD = 24
# The least number of safety examples in a refresh.
_FEWEST = 2


class SafetyGeometry:
    """The safety subspace of a run, its schedule and its state.

    Args:
        probe: the safety examples; more than ``trial_examples`` of them.
        config: how the subspace is estimated and used.

    Attributes:
        subspace: the present estimate, None before the first step.
        spanned: the parameters that it was made for; empty before the first step.
        pull: to the aligned model; None before the first step, and where there is none.
        reference: the alignment loss before fine-tuning, a mean over the trial examples and those
            of the first look; None before the first step.
        history: all measurements, oldest first.
        coupling: γ_t, see `observe_gradient`; None before two steps on one subspace.
        update: Uᵀu, the base optimizer's last step inside the subspace, before it was mapped; shape
            ``(k,)``, None before the first step.
        step_count: optimizer steps seen.
        last_rate: learning rate of the last of them; None before the first.
        last_refresh: the step after which the subspace was last estimated.

    Raises:
        TypeError: if ``probe`` is not a `SafetyProbe`.
        ValueError: if the probe has too few examples.
    """

    def __init__(self, probe: SafetyProbe, config: SafetyConfig) -> None:
        if not isinstance(probe, SafetyProbe):
            raise TypeError(f"probe={type(probe).__name__}: expected a safeopt.SafetyProbe")
        if config.damping:
            require_enough(probe, config.trial_examples)
        self.probe = probe
        self.config = config
        self.rota = ExampleRota(probe, config.trial_examples, config.seed, _MOST_HELD)
        self.subspace: SafetySubspace | None = None
        self.spanned: list[Tensor] = []
        self.pull: ElasticPull | None = None
        self.reference: float | None = None
        self.history: list[Measurement] = []
        self.coupling: float | None = None
        self.update: Tensor | None = None
        self.step_count = 0
        self.last_rate: float | None = None
        self.last_refresh = 0
        self._travelled = 0.0  # Σ η_t, the sum of all steps' learning rates
        self._checked = 0  # the step at which `restore` last ran to its end
        self._reference_odds: float | None = None  # the highest log-odds of the same examples
        self._trial_reference: float | None = None  # the trial examples' loss before fine-tuning
        self._position = torch.zeros(0, dtype=torch.float64, device="cpu")  # c after the last step
        self._first_drift: Tensor | None = None
        self._taken_back = torch.zeros(
            0, dtype=torch.float64, device="cpu"
        )  # Σ (c − c⁺) since the last refresh
        self._last_gradient: Tensor | None = None

    @property
    def active(self) -> bool:
        """False where ``damping=0`` switches the protection off."""
        return self.config.damping > 0

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
            with whole_or_not_at_all(self, params):
                self._begin(params)

    def _begin(self, params: Sequence[Tensor]) -> None:
        trial = self.rota.measure(self.probe)
        self._trial_reference = float(trial.mean())
        if pulls(self.config, basis_kind(None, params, self.probe, self.config)):
            self.pull = ElasticPull.at(params)
        self._estimate(params, self._due(self.config.examples))
        assert self.subspace is not None
        self.spanned = list(params)
        window = self.subspace.window
        losses = torch.cat([trial, window.losses[window.safety].cpu()])
        tokens = self.probe.response_tokens(self.rota.trial)
        tokens = torch.cat([tokens, window.tokens[window.safety].cpu()])
        self.reference = float(losses.mean())
        # The goal of all is the firmest refusal: these few examples' mean depends on the draw,
        # and what comes back to less does not carry over to prompts outside of the probe.
        self._reference_odds = float(log_odds(losses, tokens).max())

    def after_step(self, params: Sequence[Tensor], learning_rate: float) -> None:
        """Protect the parameters that the base optimizer has just moved.

        Args:
            params: the protected parameters; changed in place inside the subspace.
            learning_rate: the step's learning rate, for the next step's coupling.

        Raises:
            FloatingPointError: if parameters are not finite, before anything has changed: one
                such number would spread over all of them.
        """
        if self.subspace is None:
            return
        position, gradient = coordinates_together(
            self.subspace.basis, params, [p.grad for p in params]
        )
        if not bool(position.isfinite().all()):
            raise FloatingPointError(
                "after the base optimizer's step parameters are not finite; they are left as they "
                "are. Lower the learning rate, or train in float32 or bfloat16"
            )
        self.step_count += 1
        if any(p.grad is not None for p in params):
            self.observe_gradient(gradient, self.last_rate)
        else:  # the base optimizer has cleared them
            self.coupling = self._last_gradient = None
        self.last_rate = learning_rate
        c = position - self.subspace.anchor
        self.update = c - self._position
        self._travelled += learning_rate
        if self.pull is not None:
            strength = self.config.elastic * learning_rate / self._travelled
            c = c + self.pull.apply(params, strength, self.subspace.basis)
        mapped = self._map(c)
        if mapped is not c:  # mode "none" moves nothing
            self.subspace.shift(params, mapped - c)
        elif self.pull is not None:
            self.probe.layout(params).publish()
        self._taken_back = self._taken_back + (c - mapped)
        self._position = mapped
        if self.config.refresh.due(self.step_count, self.last_refresh, self._drift()):
            with whole_or_not_at_all(self, params) as before_move:
                self._refresh(params, before_move, self._due(self.config.examples))

    def restore(self, params: Sequence[Tensor]) -> Measurement:
        """Measure the alignment loss now and, where examples are lost, restore them.

        For the moments that count: before a checkpoint is saved and at the end of training. It ends
        when the trial examples, which span no subspace, are within the budget, or after one
        more round; then a warning is logged.

        Returns:
            The last measurement. Cost: one forward pass on the trial examples and, unless a refresh
            has just been made, one refresh on up to twice `SafetyConfig.examples`; more where
            alignment was lost; nothing if no step was taken since the last call.
        """
        if not self.active:
            raise RuntimeError("restore: damping=0 has switched the protection off")
        if self.subspace is None:
            self.before_step(params)
        elif self.step_count > self._checked:
            with whole_or_not_at_all(self, params) as before_move:
                self._restore(params, before_move)
            self._checked = self.step_count
        return self.history[-1]

    def _restore(self, params: Sequence[Tensor], before_move: Callable[[], None]) -> None:
        trial: float | None = None
        if self.step_count > self.last_refresh:
            count = self._due(self.config.restore_examples)
            trial = self._refresh(params, before_move, count, search=True)
        if not self._restores:
            return
        assert self._trial_reference is not None
        limit = self._trial_reference + self.config.budget
        if trial is None:
            trial = finite(self.probe.value(self.rota.trial))
        for _ in range(_ROUNDS):
            if trial > limit:
                count = self.config.restore_examples
                trial = self._refresh(params, before_move, count, search=True, trial=trial)
                assert trial is not None  # a search measures it, and without one it is as before
        if trial > limit:
            logger.warning(
                "restore: the trial examples' alignment loss is %.4f, above its limit %.4f",
                trial,
                limit,
            )

    def observe_gradient(self, coordinates: Tensor, learning_rate: float | None) -> None:
        """Update the coupling γ_t from the task gradient's coordinates Uᵀg, which cost k numbers.

        The change of Uᵀg from step to step is UᵀH(θ_t − θ_{t−1}); divided by the learning rate and
        weighted with Λ^{1/2} it is the curvature coupling of the Alignment Instability Condition,
        ‖F^{1/2}PHg‖, for a step −ηg. With mini-batches it also holds their noise, and with Adam the
        step is not −ηg: read it as a relative figure. Coordinates that have overflowed leave none.

        Args:
            coordinates: Uᵀg_t, shape ``(k,)``.
            learning_rate: η of the step from θ_{t−1} to θ_t, a scheduler may have changed it since.
        """
        assert self.subspace is not None
        if not bool(coordinates.isfinite().all()):
            self.coupling = self._last_gradient = None  # a state with them would not be loaded
            return
        if self._last_gradient is not None and learning_rate:
            change = (coordinates - self._last_gradient) / learning_rate
            self.coupling = float((self.subspace.eigenvalues.sqrt() * change).norm())
        self._last_gradient = coordinates

    def counters(self) -> dict[str, int | float | None]:
        """The plain numbers that a checkpoint carries."""
        return {
            "step_count": self.step_count,
            "last_refresh": self.last_refresh,
            "drawn": self.rota.drawn,
            "held_drawn": self.rota.held_drawn,
            "checked": self._checked,
            "trial_reference": self._trial_reference,
            "reference": self.reference,
            "reference_odds": self._reference_odds,
            "coupling": self.coupling,
            "last_rate": self.last_rate,
            "travelled": self._travelled,
        }

    def vectors(self) -> dict[str, Tensor | None]:
        """The k-vectors of the present interval that a checkpoint carries."""
        return {
            "position": self._position,
            "taken_back": self._taken_back,
            "held_targets": self.rota.held_targets,
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
        self._checked = state["checked"]
        self.rota.drawn, self.rota.held_drawn = state["drawn"], state["held_drawn"]
        self._trial_reference = state["trial_reference"]
        self.reference, self._reference_odds = state["reference"], state["reference_odds"]
        self.coupling, self.last_rate = state["coupling"], state["last_rate"]
        self._travelled = state["travelled"]
        self.history = [Measurement(*entry) for entry in state["history"]]
        self.subspace = subspace
        if subspace is not None:
            self._position = vectors["position"]  # type: ignore[assignment]
            self._taken_back = vectors["taken_back"]  # type: ignore[assignment]
            self.rota.held_targets = vectors["held_targets"]  # type: ignore[assignment]
            self._first_drift = vectors["first_drift"]
            self._last_gradient = vectors["last_gradient"]

    def _map(self, c: Tensor) -> Tensor:
        """The configured map c → c⁺; its target c* is the anchor."""
        assert self.subspace is not None
        surrogate, target = self.subspace.surrogate, torch.zeros_like(c)
        mode = self.config.mode
        if mode == "none":
            return c
        if mode == "project":
            return target
        if mode == "damp":
            mean = surrogate.eigenvalues.mean().clamp(min=torch.finfo(c.dtype).tiny)
            relative = surrogate.eigenvalues / mean
            return maps.damp(c, target, relative, self.config.damping)
        if mode == "budget":
            assert self.reference is not None
            rise = self.reference + self.config.budget - surrogate.value
            return maps.limit_to_budget(c, surrogate, max(rise, 0.0))
        if self._first_drift is None:
            self._first_drift = c - self._position
        return maps.remove_acceleration(self._position, self._first_drift)

    def _drift(self) -> float:
        """The surrogate's rise where all steps since the last refresh would have led, in nats."""
        assert self.subspace is not None
        surrogate = self.subspace.surrogate
        return surrogate.predict(self._position + self._taken_back) - surrogate.value

    @property
    def _restores(self) -> bool:
        """Whether lost examples are brought back: a random subspace knows none."""
        return self.config.restore_alignment and self.config.curvature == "fisher"

    def _refresh(
        self,
        params: Sequence[Tensor],
        before_move: Callable[[], None],
        count: int,
        *,
        search: bool = False,
        trial: float | None = None,
    ) -> float | None:
        """Measure, renew the subspace and step back where an example of the window is lost.

        Args:
            params: the protected parameters.
            before_move: called before they are moved.
            count: number of safety examples.
            search: whether this is `restore`'s look: the step's length is searched, and it does not
                aim beyond the goal, for what comes next is a checkpoint.
            trial: the trial examples' loss, where it was just measured.

        Returns:
            The trial examples' loss now, None if it was not measured.
        """
        assert self._reference_odds is not None
        steps = self.step_count - self.last_refresh
        drawn = self._estimate(params, count)
        if not self._restores:
            return trial
        assert self.subspace is not None
        window = self.subspace.window
        goal = window.losses_at(self._reference_odds) + self.config.budget
        if not window.loses(goal, _UNNOTICED):
            return trial
        beyond = 0.0 if search or self.probe.loss is not refusal_nll else _FIRMER
        step = window.restoring_step(goal, self.config.newton_damping, beyond)
        if not step.any():
            return trial
        before_move()
        if search or steps >= _SOON:
            step, trial = self._search(params, step, trial)
        else:
            self.subspace.shift(params, step)
            trial = None
        fresh = window.moved(step).latest(drawn)
        expected = float(fresh.losses[fresh.safety].mean())
        self.subspace.rebase(params, step, expected)
        restored = expected if trial is None else trial
        self.history[-1] = replace(self.history[-1], restored_to=restored)
        return trial

    def _due(self, most: int) -> int:
        """Number of safety examples to look at now: one for each step since the last look."""
        return min(max(self.step_count - self.last_refresh, _FEWEST), most)

    def _estimate(self, params: Sequence[Tensor], count: int) -> int:
        """Measure the alignment loss on new examples and renew the subspace at ``params``.

        Returns:
            The number of examples drawn, safety and held ones.
        """
        predicted = self.predicted
        self.subspace, look, squares = estimate(
            self.subspace, params, self.probe, self.rota, self.config, count
        )
        if self.pull is not None and squares is not None:
            self.pull = self.pull.observed(squares, self.probe.layout(params))
        self.last_refresh = self.step_count
        self._position = torch.zeros_like(self.subspace.anchor)
        self._taken_back = torch.zeros_like(self.subspace.anchor)
        self._first_drift = self._last_gradient = None
        value = self.subspace.surrogate.value
        self.history.append(Measurement(self.step_count, value, predicted, None, len(look.safety)))
        logger.info("safety subspace at step %d: %s", self.step_count, self.history[-1])
        return len(look.indices)

    def _search(
        self, params: Sequence[Tensor], step: Tensor, before: float | None
    ) -> tuple[Tensor, float]:
        """Backtracking line search on the trial examples; moves the parameters.

        Returns:
            The step taken, zero if every length raises the trial loss, and the trial loss there.
        """
        assert self.subspace is not None
        assert self._trial_reference is not None
        trial = self.rota.trial
        before = finite(self.probe.value(trial)) if before is None else before
        # Where the trial examples have lost nothing, the step need not improve them.
        limit = max(before, self._trial_reference + self.config.budget)
        length, value = backtrack(
            self.subspace, params, step, _LENGTHS, lambda: self.probe.value(trial), limit
        )
        if value is not None:
            return length * step, value
        return torch.zeros_like(step), before
