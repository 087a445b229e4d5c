"""SafetyMonitor: watch the alignment loss while a model is trained, and act where it is lost.

It works beside any optimizer and changes none of its steps. The alignment loss is measured now and
then, the other figures come from the safety subspace and cost k numbers a step:

================  =============================================================================
alignment loss    measured, on the same examples every time: every ``every`` steps, and earlier
                  where the prediction leaves the budget or the subspace was estimated anew
prediction        the last measurement and the rise since then, by the quadratic model of
                  `safeopt.curvature.surrogate`
coupling γ_t      how fast the task's curvature turns the gradient into the safety subspace, see
                  `SafetyGeometry.observe_gradient`
overlap           ‖Uᵀu‖/‖u‖ of the base optimizer's step u; √(k/n) for a random one
subspace drift    share of the safety curvature outside of the subspace of the estimate before
================  =============================================================================
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from safeopt.diagnostics.observation import Observation
from safeopt.diagnostics.snapshot import Snapshot, Stateful, deployed, lower_learning_rate
from safeopt.optim.examples import ExampleRota
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

Action = Literal["warn", "stop", "rollback"]


@dataclass(frozen=True)
class Check:
    """One look at the run. Losses in nats a token; None stands for what is not known.

    Attributes:
        step: as it was given.
        alignment_loss: where it was measured at this check, before a rollback if there was one; or
            was asked for where it had just been measured.
        alignment_predicted: what was expected before measuring.
        alignment_limit: the alignment loss at the start plus the budget.
        coupling: γ_t.
        overlap: ‖Uᵀu‖/‖u‖.
        subspace_drift: at the last refresh of the subspace.
        learning_rate_scale: by what the rollbacks so far have multiplied the learning rate.
        alarm: whether the measured loss is above the limit, or no number.
        rolled_back: whether the run was put back to the last safe checkpoint.
        stop: whether training should end here.
    """

    step: int
    alignment_loss: float | None = None
    alignment_predicted: float | None = None
    alignment_limit: float | None = None
    coupling: float | None = None
    overlap: float | None = None
    subspace_drift: float | None = None
    learning_rate_scale: float = 1.0
    alarm: bool = False
    rolled_back: bool = False
    stop: bool = False

    def figures(self) -> dict[str, float]:
        """The figures that are known, by name, for a log."""
        named = asdict(self)
        del named["step"]
        return {name: float(value) for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class _Safe:
    """The last safe checkpoint: where the run was measured within its budget."""

    step: int | None  # None before the first step of this run, which may be a resumed one
    alignment_loss: float
    scale: float  # of the learning rate
    run: Snapshot
    view: Any


class SafetyMonitor:
    """Watches a run and acts where its alignment is lost.

    Call `check` after every step::

        monitor = SafetyMonitor(optimizer, probe, action="rollback", others=[scheduler])
        for step, batch in enumerate(loader, start=1):
            ...  # backward, optimizer.step(), scheduler.step()
            if monitor.check(step).stop:
                break

    Before the first step it measures the alignment loss that the budget is added to: the model is
    then still the aligned one. A spike between two measurements is acted on at the next one; call
    ``check(step, measure=True)`` before you save the model.

    Args:
        optimizer: any torch optimizer, protected or not, before its first step.
        probe: safety examples; its model holds the optimizer's parameters. Examples that a
            protected optimizer does not see judge it more strictly: give it a probe of its own.
        budget: accepted rise of the alignment loss, at least 0, in nats a token.
        every: the longest time between two measurements, in steps, at least 1.
        examples: safety examples that are measured, at least 1 and fewer than the probe has.
        action: what happens where a measurement is above the limit. ``"warn"`` logs a warning,
            ``"stop"`` asks to stop, ``"rollback"`` puts the run back to the last check that was
            measured within the budget and lowers the learning rate; where that has happened
            ``max_rollbacks`` times before, it asks to stop there. A resumed run that begins above
            the limit has no safe checkpoint and is asked to stop, as is a run whose optimizer was
            given further parameters after its last one.
        others: schedulers, scalers and whatever else with a ``state_dict`` is put back, too.
        lr_factor: what a rollback multiplies the learning rate by, in (0, 1].
        max_rollbacks: at least 0.
        seed: which examples are measured.

    Attributes:
        history: the checks at which the alignment loss was measured, oldest first.
        reference: the alignment loss before the first step; None until then.
        rollbacks: number of rollbacks so far, the one that stopped training included.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if ``probe`` is not a `SafetyProbe`, or ``optimizer`` not a torch optimizer, or
            one that wraps another and takes no hooks.

    Cost: a measurement is a forward pass over ``examples`` short prompts. Beside an unprotected
    optimizer, a basis of at most 32 numbers a parameter, 3·k·n multiplications a step, and after 4,
    8, 16, … steps a forward and a backward pass over at most four prompts. With
    ``"rollback"``, one `Snapshot` in memory.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        probe: SafetyProbe,
        *,
        budget: float = 0.05,
        every: int = 10,
        examples: int = 8,
        action: Action = "warn",
        others: Sequence[Stateful] = (),
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={type(optimizer).__name__}: expected a torch optimizer")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"optimizer={type(optimizer).__name__}: it wraps another optimizer and takes no "
                "hooks; watch the one inside (of Accelerate's wrapper, wrapper.optimizer)"
            )
        if not isinstance(probe, SafetyProbe):
            raise TypeError(f"probe={type(probe).__name__}: expected a safeopt.SafetyProbe")
        if not (isinstance(budget, (int, float)) and 0 <= budget < math.inf):
            raise ValueError(f"budget={budget}: the accepted rise of the alignment loss (>= 0)")
        if action not in get_args(Action):
            raise ValueError(f'action="{action}": expected one of "warn", "stop", "rollback"')
        if not (isinstance(lr_factor, (int, float)) and 0 < lr_factor <= 1):
            raise ValueError(f"lr_factor={lr_factor}: a rollback lowers the rate (0 < factor <= 1)")
        for name, count, least in (
            ("every", every, 1),
            ("examples", examples, 1),
            ("max_rollbacks", max_rollbacks, 0),
        ):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name}={count}: expected a whole number, at least {least}")
        if len(probe) <= examples:
            raise ValueError(
                f"examples={examples}: the probe has {len(probe)} safety examples; it needs at "
                f"least {examples + 1}, as the measured ones are kept out of the subspace"
            )
        self.optimizer = optimizer
        self.probe = probe
        self.budget = budget
        self.every = every
        self.action = action
        self.others = list(others)
        self.lr_factor = lr_factor
        self.max_rollbacks = max_rollbacks
        self.history: list[Check] = []
        self.reference: float | None = None
        self.rollbacks = 0
        self._measured = ExampleRota(probe, examples, seed).trial
        self._scale = 1.0  # of the learning rate, by rollbacks
        self._safe: _Safe | None = None
        self._loss: float | None = None  # as it was last measured
        self._looked_at = 0  # the observation's step there
        self._stopping = False  # what was said there
        self._observation = Observation(
            # Between its steps SafetySAM's parameters are perturbed, its base optimizer's are not.
            getattr(optimizer, "base_optimizer", optimizer),
            probe,
            examples=examples,
            every=every,
            seed=seed,
            on_start=self._start,
        )

    def check(self, step: int, *, measure: bool = False) -> Check:
        """Look at the run after a step, and act where it has left its budget.

        Args:
            step: for the history and the log.
            measure: measure now, whether it is due or not; where no step was taken since the last
                measurement, what that one found is returned, and whether training should end.

        Returns:
            What is known now. Where ``rolled_back``, the run stands at the last safe checkpoint.
        """
        if self.reference is None or self._loss is None:
            return Check(step)  # no step was taken yet
        found = self._unmeasured(step)
        since = self._observation.steps - self._looked_at
        predicted, limit = found.alignment_predicted, self.reference + self.budget
        foreseen = predicted is None or not predicted <= limit
        known = not self._loss <= limit  # with "warn" a run goes on above its limit
        if since == 0 and measure:  # nothing has moved since it was measured
            stop = self._stopping or (known and self.action != "warn")
            return replace(found, alignment_loss=self._loss, alarm=known, stop=stop)
        due = since >= self.every or (foreseen and not known)
        if since == 0 or not (due or measure):
            return found
        found = replace(found, alignment_loss=self._look())
        if self._loss <= limit:
            if self.action == "rollback":
                self._keep(step)
        else:  # also where it is no number
            found = self._act(found)
        self._stopping = found.stop  # also of a run that its last rollback has left within limits
        self.history.append(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain numbers; the safe checkpoint is not in it."""
        return {"reference": self.reference, "rollbacks": self.rollbacks, "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; call it before the first step of the resumed run."""
        self.reference = state["reference"]
        self.rollbacks = state["rollbacks"]
        self._scale = state["scale"]

    def close(self) -> None:
        """Follow the optimizer no longer, and let go of the safe checkpoint."""
        self._observation.close()
        self._safe = None

    def _start(self) -> None:
        """Before the first step: what the aligned model's loss is, and a first safe checkpoint."""
        loss = self._look()
        if self.reference is None:
            self.reference = loss
        if self.action == "rollback" and loss <= self.reference + self.budget:
            self._keep(None)

    def _look(self) -> float:
        """Measure the alignment loss."""
        with deployed(self.optimizer):
            self._loss = self.probe.value(self._measured)
        self._looked_at = self._observation.steps
        self._observation.mark()
        return self._loss

    def _unmeasured(self, step: int) -> Check:
        assert self.reference is not None
        assert self._loss is not None
        observed = self._observation
        rise = observed.rise
        return Check(
            step,
            alignment_predicted=None if rise is None else self._loss + rise,
            alignment_limit=self.reference + self.budget,
            coupling=observed.geometry.coupling,
            overlap=observed.overlap,
            subspace_drift=observed.subspace_drift,
            learning_rate_scale=self._scale,
        )

    def _keep(self, step: int | None) -> None:
        assert self._loss is not None
        self._safe = None  # its memory is needed now
        run = Snapshot(self.probe.model, self.optimizer, self.others)
        self._safe = _Safe(step, self._loss, self._scale, run, self._observation.save())

    def _act(self, found: Check) -> Check:
        limit = found.alignment_limit
        what = f"step {found.step}: alignment loss {found.alignment_loss:.4f}, limit {limit:.4f}"
        if self.action == "warn":
            logger.warning("%s", what)
            return replace(found, alarm=True)
        if self.action == "stop" or self._safe is None or not self._safe.run.fits:
            logger.warning("%s; stopping", what)
            return replace(found, alarm=True, stop=True)
        stop = self.rollbacks >= self.max_rollbacks
        self._roll_back(self._safe, 1.0 if stop else self.lr_factor)
        logger.warning(
            "%s; back to %s, %s",
            what,
            "the start of this run" if self._safe.step is None else f"step {self._safe.step}",
            "stopping" if stop else f"learning rate times {self._scale:g}",
        )
        return replace(
            found, alarm=True, rolled_back=True, stop=stop, learning_rate_scale=self._scale
        )

    def _roll_back(self, safe: _Safe, factor: float) -> None:
        passes = self._observation.geometry.passes
        spent = passes.as_dict()
        safe.run.restore()
        self._observation.load(safe.view)
        for name, value in spent.items():  # what was spent stays spent
            setattr(passes, name, value)
        self.rollbacks += 1
        self._scale *= factor
        lower_learning_rate(self.optimizer, self.others, self._scale / safe.scale)
        self._loss, self._looked_at = safe.alignment_loss, self._observation.steps
        self._observation.mark()
