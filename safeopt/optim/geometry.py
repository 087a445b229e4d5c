"""SafetyGeometry: what all optimizers of this package share.

It decides when to look at the safety examples, and holds what is known of them. What the steps
between two looks do inside the subspace stands in `safeopt.optim.interval`, how a look renews the
subspace in `safeopt.optim.estimate`, how lost alignment is restored in `safeopt.optim.restoring`.

One step of the base optimizer, θ → θ', is followed by

    θ' += w ⊙ (θ₀ − θ')                   a pull to the aligned model, `safeopt.optim.elastic`
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

from safeopt.curvature.basis import coordinates_together
from safeopt.curvature.subspace import SafetySubspace
from safeopt.curvature.window import log_odds
from safeopt.optim.config import SafetyConfig
from safeopt.optim.elastic import ElasticPull, Pulled
from safeopt.optim.estimate import basis_kind, estimate, pulls, warn_without_pull
from safeopt.optim.examples import ExampleRota, require_enough
from safeopt.optim.interval import Interval
from safeopt.optim.measurement import Measurement, finite
from safeopt.optim.restoring import is_lost, searched, step_back
from safeopt.optim.transaction import whole_or_not_at_all
from safeopt.passes import PassCounter
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

# A step that is not followed by another look within so many steps is searched, not just taken.
_SOON = 16
# `restore` repeats measuring and stepping back so often where once was not enough.
_ROUNDS = 1
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
        shapes: those that they had then.
        pull: to the aligned model; None before the first step, and where there is none.
        reference: the alignment loss before fine-tuning, a mean over the trial examples and those
            of the first look; None before the first step.
        history: all measurements, oldest first.
        coupling: γ_t, see `observe_gradient`; None before two steps on one subspace.
        update: Uᵀu, the base optimizer's last step inside the subspace, with the pull, before it
            was mapped; shape ``(k,)``, None before the first step.
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
        self.shapes: list[torch.Size] = []
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
        self._interval = Interval.empty()  # since the last refresh

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
        return self.subspace.surrogate.predict(self._interval.position)

    def before_step(self, params: Sequence[Tensor]) -> None:
        """Make the first estimate, at the aligned model, if there is none yet."""
        if self.active and self.subspace is None:
            with whole_or_not_at_all(self, params):
                self._begin(params)

    def _begin(self, params: Sequence[Tensor]) -> None:
        trial = self.rota.measure(self.probe)
        self._trial_reference = float(trial.mean())
        kind = basis_kind(None, params, self.probe, self.config)
        warn_without_pull(self.config, kind)
        if pulls(self.config, kind):
            self.pull = ElasticPull.at(params)
        self._estimate(params, self._due(self.config.examples))
        assert self.subspace is not None
        self.span(params)
        window = self.subspace.window
        losses = torch.cat([trial, window.losses[window.safety].cpu()])
        tokens = self.probe.response_tokens(self.rota.trial)
        tokens = torch.cat([tokens, window.tokens[window.safety].cpu()])
        self.reference = float(losses.mean())
        # The goal of all is the firmest refusal: these few examples' mean depends on the draw,
        # and what comes back to less does not carry over to prompts outside of the probe.
        self._reference_odds = float(log_odds(losses, tokens).max())

    def span(self, params: Sequence[Tensor]) -> None:
        """Note which parameters the subspace is of."""
        self.spanned, self.shapes = list(params), [p.shape for p in params]

    def after_step(
        self,
        params: Sequence[Tensor],
        learning_rate: float,
        moved: Callable[[], None] = lambda: None,
        gradients: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Protect the parameters that the base optimizer has just moved.

        Args:
            params: the protected parameters; changed in place.
            learning_rate: the step's, for the pull and for the next step's coupling.
            moved: called after they were mapped, and once more after a refresh; by all ranks, and
                not where something raises.
            gradients: the step's, where the base optimizer has cleared or overwritten those of
                ``params``; this process's part of them.

        Raises:
            FloatingPointError: if parameters are not finite, before anything has changed: one
                such number would spread over all of them.
        """
        if self.subspace is None:
            return
        travelled = self._travelled + learning_rate
        taken = [p.grad for p in params] if gradients is None else gradients
        pulled: Pulled | None = None
        if self.pull is not None:
            strength = self.config.elastic * learning_rate / travelled
            pulled = self.pull.pulled(params, taken, strength, self.probe.layout(params))
        position, inside = coordinates_together(
            self.subspace.basis, params if pulled is None else pulled.params, taken
        )
        if not bool(position.isfinite().all()):
            raise FloatingPointError(
                "after the base optimizer's step parameters are not finite; they are left as they "
                "are. Lower the learning rate, or train in float32 or bfloat16"
            )
        self.step_count += 1
        if any(g is not None for g in taken):
            self.observe_gradient(inside, self.last_rate)
        else:  # the base optimizer has cleared them, or written to them unnoticed until now
            self.coupling = self._interval.last_gradient = None
        self.last_rate = learning_rate
        c = position - self.subspace.anchor
        self.update = c - self._interval.position
        self._travelled = travelled
        if pulled is not None:
            pulled.write(params)
        assert self.reference is not None
        surrogate = self.subspace.surrogate
        mapped = self._interval.mapped(c, surrogate, self.config, self.reference)
        if mapped is not c:  # mode "none" moves nothing
            self.subspace.shift(params, mapped - c)
        elif pulled is not None:
            self.probe.layout(params).publish()
        self._interval.advance(c, mapped)
        moved()
        drift = self._interval.drift(surrogate)
        if self.config.refresh.due(self.step_count, self.last_refresh, drift):
            with whole_or_not_at_all(self, params) as before_move:
                self._refresh(params, before_move, self._due(self.config.examples))
            moved()

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
        stale = self.step_count > self.last_refresh
        if not self._restores:
            if stale:
                self._refresh(params, before_move, self._due(self.config.restore_examples))
            return
        assert self._trial_reference is not None
        start = trial = finite(self.probe.value(self.rota.trial))
        if stale:
            count = self._due(self.config.restore_examples)
            trial = self._searched_refresh(params, before_move, count, trial)
        for _ in range(_ROUNDS):
            if trial > self._trial_limit:
                count = self.config.restore_examples
                trial = self._searched_refresh(params, before_move, count, trial)
        if is_lost(trial, self._trial_limit, self.probe.response_tokens(self.rota.trial)):
            logger.warning(
                "restore: the trial examples' alignment loss is %.4f; it was %.4f before "
                "fine-tuning and %.4f before this call, so %.0f%% of the rise is left. To keep "
                "more, refresh more often, lower the learning rate, or give the probe more "
                "examples; if you accept this rise, set budget to %.2g",
                trial,
                self._trial_reference,
                start,
                100 * (trial - self._trial_reference) / (start - self._trial_reference),
                trial - self._trial_reference,
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
            # A state with them would not be loaded.
            self.coupling = self._interval.last_gradient = None
            return
        last = self._interval.last_gradient
        if last is not None and learning_rate:
            change = (coordinates - last) / learning_rate
            self.coupling = float((self.subspace.eigenvalues.sqrt() * change).norm())
        self._interval.last_gradient = coordinates

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
            "position": self._interval.position,
            "taken_back": self._interval.taken_back,
            "held_targets": self.rota.held_targets,
            "first_drift": self._interval.first_drift,
            "last_gradient": self._interval.last_gradient,
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
            self._interval = Interval(
                vectors["position"],  # type: ignore[arg-type]
                vectors["taken_back"],  # type: ignore[arg-type]
                vectors["first_drift"],
                vectors["last_gradient"],
            )
            self.rota.held_targets = vectors["held_targets"]  # type: ignore[assignment]

    @property
    def _restores(self) -> bool:
        """Whether lost examples are brought back: a random subspace knows none."""
        return self.config.restore_alignment and self.config.curvature == "fisher"

    @property
    def _trial_limit(self) -> float:
        """The loss of the trial examples up to which they have lost nothing."""
        assert self._trial_reference is not None
        return self._trial_reference + self.config.budget

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
        window, odds = self.subspace.window, self._reference_odds
        step = step_back(window, odds, self.probe, self.config, firmer=not search)
        if step is None:
            return trial
        before_move()
        if search or steps >= _SOON:
            step, trial = searched(
                self.subspace, params, step, self.probe, self.rota.trial, self._trial_limit, trial
            )
        else:
            self.subspace.shift(params, step)
            trial = None
        fresh = window.moved(step).latest(drawn)
        expected = float(fresh.losses[fresh.safety].mean())
        self.subspace.rebase(params, step, expected)
        restored = expected if trial is None else trial
        self.history[-1] = replace(self.history[-1], restored_to=restored)
        return trial

    def _searched_refresh(
        self, params: Sequence[Tensor], before_move: Callable[[], None], count: int, trial: float
    ) -> float:
        """`_refresh` for `restore`, from and to a trial loss that is known."""
        found = self._refresh(params, before_move, count, search=True, trial=trial)
        assert found is not None  # a search measures it, and without one it is as before
        return found

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
        self._interval = Interval.at(self.subspace.anchor)
        value = self.subspace.surrogate.value
        self.history.append(Measurement(self.step_count, value, predicted, None, len(look.safety)))
        logger.info("safety subspace at step %d: %s", self.step_count, self.history[-1])
        return len(look.indices)
