"""SafetySAM: sharpness-aware minimisation whose perturbation lies in the safety subspace.

A base optimizer steps with the task gradient of a point beside the parameters,

    θ ← step(θ, ∇L(θ + ε)),     ε = ρ·U e,   e ∈ Rᵏ a unit vector in the safety subspace

`safeopt.optim.ascent` derives what the two directions e achieve, and what they do not: the drift
that remains lies in the subspace, where the shared map takes it out. With it SafetySAM turns the
task towards optima that do not push into the subspace, and the map keeps c in place meanwhile.

**Two ways to evaluate ∇L(θ + ε).** ``two_pass`` runs a closure at θ and again at θ + ε: the task's
e is that of the present Uᵀg, at twice the cost. ``lookahead`` holds the parameters at θ + ε between
the steps, so that the one backward pass of any training loop yields ∇L(θ + ε); its e is that of an
exponential average of past Uᵀg, k numbers, which a refresh carries over to the new basis.

In both, θ is kept as a copy while the parameters are perturbed (`HeldParameters` says why): one
number for each protected parameter beside the k of the basis.

**Acceleration.** With ``protection="acceleration"`` the map keeps the drift ċ₀ of the first step
after a refresh, in which ε takes part (−ηUᵀg(θ + ε)), and removes what c̈ = UᵀHg adds later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from safeopt.curvature.bases import Storage
from safeopt.curvature.refresh import RefreshPolicy
from safeopt.optim.ascent import Ascent, SubspaceAscent, is_finite
from safeopt.optim.config import Curvature, Mode, SafetyConfig, one_of
from safeopt.optim.groups import largest_learning_rate, spanned_parameters
from safeopt.optim.holding import HeldParameters
from safeopt.optim.measurement import Measurement
from safeopt.optim.portable import hide
from safeopt.optim.protection import OnRefreshError, restore
from safeopt.optim.safeguard import safeguard
from safeopt.optim.schedule_free import is_schedule_free
from safeopt.optim.wrapper import OptimizerWrapper, base_of
from safeopt.probe import SafetyProbe

Evaluation = Literal["two_pass", "lookahead"]


class SafetySAM(OptimizerWrapper):
    r"""Sharpness-aware minimisation in the safety subspace, around any base optimizer.

    .. code-block:: text

        two_pass, at every step t:            lookahead, at every step t:
            g  = ∇L(θ)          (closure)         g  = ∇L(θ + ε)      (your backward pass)
            ε  = ρ U e(g)                         θ  = base(θ, g)
            g' = ∇L(θ + ε)      (closure)         θ  = θ + U(map(c) − c); refresh, restore
            θ  = base(θ, g')                      m  = β m + (1 − β) Uᵀg
            θ  = θ + U(map(c) − c); refresh …     ε  = ρ U e(m); hold θ + ε

    It is an optimizer whose ``param_groups`` and ``state`` are the base optimizer's own, so that
    schedulers, clipping and `GradScaler` act on the base optimizer. The subspace, its refreshes,
    the restoring and the map after the step are those of `ProjectedAdamW`. ρ is the strength of the
    perturbation, ``damping`` that of the map: ``rho=0`` leaves the perturbation out, ``damping=0``
    the map (SAM alone, if ``restore_alignment`` is False too), both together leave the base
    optimizer alone, bit for bit and without a safety pass.

    **lookahead** needs no closure. Between the steps the model is held at θ + ε: call `eval` before
    you evaluate or save it and `train` before you go on, as with schedule-free optimizers (Trainer
    and Accelerate do), or use `unperturbed`. Call `train` after loading a checkpoint, too.
    `restore`, which comes before every checkpoint, leaves the parameters at θ until the next
    `train` or ``step``. What the optimizer saves is never perturbed. Do not write to the parameters
    while they are held; the next step refuses to overwrite what was written, but does not notice
    what was written through ``.data``.

    **two_pass** calls ``step(closure)``; the closure clears the gradients, computes them anew (in
    several backward passes, clipped, as you like) and returns the loss. It is called twice. Where a
    gradient scaler must see the gradients before the step, make the two passes yourself::

        scaler.scale(compute_loss()).backward()
        with optimizer.second_pass():
            scaler.scale(compute_loss()).backward()
        scaler.step(optimizer)
        scaler.update()

    ε does not depend on the gradient's length, so the scale does not matter. After an overflow in
    the first pass ``ascent="task"`` perturbs nothing; ``"safety"`` needs no gradient. A skipped
    step does not count. A second pass belongs to the gradients it has made: once they are cleared
    the next step needs another one, and code that puts new tensors in their place belongs inside
    the context.

    Args:
        params: parameters, or groups of them, from which ``base_optimizer`` is built; or an
            optimizer that has taken no step yet. Groups with ``protect=False`` are neither
            perturbed nor mapped.
        base_optimizer: class of the base optimizer.
        probe: the safety examples; its model holds ``params``.
        rho: ρ, length of the perturbation, at least 0.
        mode: ``"lookahead"``, one backward pass in every training loop; ``"two_pass"``, exact.
        ascent: ``"task"`` or ``"safety"``: which loss the perturbation climbs.
        beta: β of the average in ``"lookahead"``, in [0, 1).
        rank: see `SafetyConfig`, as for all arguments up to ``seed``.
        protection: the map c → c⁺ after the step, called ``mode`` elsewhere.
        damping: strength of the map; 0 leaves it out, but neither the restoring at refreshes nor
            the pull.
        budget: accepted rise of the alignment loss, in nats a token.
        refresh: when to estimate the subspace anew.
        examples: new safety examples at one refresh, at most.
        window: latest examples whose gradients span the subspace.
        newton_damping: damping of the restoring step.
        restore_alignment: restore where the budget is exceeded.
        trial_examples: safety examples kept apart for the line search.
        curvature: ``"fisher"``, or ``"random"`` for the control experiment.
        basis: how U is stored.
        elastic: strength of a pull back to the aligned model; none by default.
        seed: of the order of the safety examples.
        on_refresh_error: ``"raise"``, or ``"warn"`` to train on without protection where a refresh
            or a gradient fails, see `safeopt.optim.protection`.
        **base_options: arguments of ``base_optimizer``: ``lr``, ….

    Attributes:
        base_optimizer: the optimizer that takes the steps.
        safety: the `SafetyGeometry`: history, measured, predicted, coupling, passes. With
            ``step(closure)`` the coupling is that of the gradients at θ, otherwise at θ + ε.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if ``probe`` is not a `SafetyProbe`, or ``base_optimizer`` not an optimizer or a
            schedule-free one.

    Cost: ``two_pass`` one more evaluation of the closure a step, ``lookahead`` none; 3·k·n
    multiplications beside the geometry's. Memory: k float32 numbers for each protected parameter,
    three more with ``elastic``, and a copy of it while it is perturbed. In bfloat16 an ε below half
    a unit in the last place of a parameter does not move it: keep trained parameters in float32.

    Source: Foret et al. 2021 (arXiv 2010.01412); the safety subspace and its coupling are those of
    Springer et al. 2026 (arXiv 2602.15799); holding the parameters beside θ follows Defazio et al.
    2024 (arXiv 2405.15682).
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: type[Optimizer] = torch.optim.AdamW,
        *,
        probe: SafetyProbe,
        rho: float = 0.05,
        mode: Evaluation = "lookahead",
        ascent: Ascent = "safety",
        beta: float = 0.9,
        rank: int = SafetyConfig.rank,
        protection: Mode = SafetyConfig.mode,
        damping: float = SafetyConfig.damping,
        budget: float = SafetyConfig.budget,
        refresh: RefreshPolicy | None = None,
        examples: int = SafetyConfig.examples,
        window: int = SafetyConfig.window,
        newton_damping: float = SafetyConfig.newton_damping,
        restore_alignment: bool = SafetyConfig.restore_alignment,
        trial_examples: int = SafetyConfig.trial_examples,
        curvature: Curvature = SafetyConfig.curvature,
        basis: Storage = SafetyConfig.basis,
        elastic: float = SafetyConfig.elastic,
        seed: int = SafetyConfig.seed,
        on_refresh_error: OnRefreshError = "raise",
        **base_options: Any,
    ) -> None:
        _check_arguments(rho, mode, ascent, beta, protection)
        alone = damping == 0 and rho > 0  # SAM without the map still needs the subspace
        base = base_of(params, base_optimizer, base_options)
        if is_schedule_free(base):
            raise TypeError(
                f"base_optimizer={type(base).__name__}: it evaluates at another point than it "
                "trains at, and so does SafetySAM; protect it with safeguard alone"
            )
        base = safeguard(
            base,
            probe,
            on_refresh_error=on_refresh_error,
            rank=rank,
            mode="none" if alone else protection,
            damping=1.0 if alone else damping,
            budget=budget,
            refresh=RefreshPolicy() if refresh is None else refresh,
            examples=examples,
            window=window,
            newton_damping=newton_damping,
            restore_alignment=restore_alignment,
            trial_examples=trial_examples,
            curvature=curvature,
            basis=basis,
            elastic=elastic,
            seed=seed,
        )
        super().__init__(base)
        self.rho = float(rho)
        self.mode = mode
        self.ascent = ascent
        self.beta = float(beta)
        self.training = True
        self._held = HeldParameters()
        # The smallest gradient of the last second pass: while it is still some parameter's .grad,
        # the next step has had its second pass.
        self._of_second_pass: Tensor | None = None
        decay = self.beta if mode == "lookahead" else None
        self._ascent = SubspaceAscent(self.safety, ascent, self.rho, decay)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: clears the gradients, computes them anew and returns the loss. Required in
                ``two_pass`` unless the second pass was made inside `second_pass`.

        Returns:
            What the closure returned, in ``two_pass`` at its first call: the loss at θ.

        Raises:
            RuntimeError: in ``two_pass`` if no second pass made the present gradients; in
                ``lookahead`` in evaluation mode, or if parameters were written to while they were
                held.
        """
        return self._two_passes(closure) if self.mode == "two_pass" else self._one_pass(closure)

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Hold the parameters at θ + ε inside, and clear the gradients at the beginning.

        For ``two_pass`` without a closure: it is entered with the gradients at θ, those at θ + ε
        are computed inside, and ``step()`` follows. Outside the parameters are θ again, bit for
        bit, also when something raises.

        Raises:
            RuntimeError: in mode ``"lookahead"``.
        """
        if self.mode != "two_pass":
            raise RuntimeError(f'second_pass: mode="{self.mode}" has none; just call step()')
        inside = None
        if self.rho > 0 and self._moves():
            self.safety.before_step(self._params())
            inside = self._inside()
        with self._perturbed(inside):
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the second pass that has made them."""
        super().zero_grad(set_to_none)
        self._of_second_pass = None

    def train(self) -> None:
        """Go on training: in ``lookahead`` hold the parameters at θ + ε again."""
        self.training = True
        self._look_ahead()

    def eval(self) -> None:
        """Return the parameters to θ, to be evaluated or saved, until `train` is called."""
        self._return()
        self.training = False

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """The parameters are θ inside, and what they were outside."""
        held = bool(self._held)
        self._return()
        try:
            yield
        finally:
            if held:
                self._look_ahead()

    def restore(self) -> Measurement:
        """Measure the alignment loss now and restore examples that are lost.

        The parameters are θ afterwards, ready to be saved, until the next `train` or ``step``.

        Returns:
            The measurement, with the loss before and after; see `ProjectedAdamW.restore`.
        """
        self._return()
        measured = restore(self.base_optimizer, self.safety)
        self._ascent.carry(self._params())
        return measured

    def _two_passes(self, closure: Callable[[], float] | None) -> float | None:
        loss, inside = None, None
        if closure is None:
            if self.rho > 0 and self._moves() and not self._second_pass_made():
                raise RuntimeError(
                    'closure=None: mode="two_pass" evaluates the loss twice; call step(closure), '
                    'make the second pass inside second_pass(), or use mode="lookahead"'
                )
        else:
            loss = self._evaluated(closure)
            if self.rho > 0 and self._moves():
                inside = self._inside()
                with self._perturbed(inside), torch.enable_grad():
                    closure()
        coupling, steps = self.safety.coupling, self.safety.step_count
        rate = self.safety.last_rate  # of the step between the two gradients
        try:
            self.base_optimizer.step()
        finally:
            self._of_second_pass = None
            if self.safety.step_count > steps and is_finite(inside):
                # The gradients that the base optimizer saw hold ρHε; ε jumps from step to step.
                change = self._ascent.change(inside)
                if change is not None and rate:
                    coupling = change / rate
                self.safety.coupling = coupling
                self._ascent.remember(inside)
            self._ascent.carry(self._params())
        return loss

    def _one_pass(self, closure: Callable[[], float] | None) -> float | None:
        if not self.training:
            raise RuntimeError(
                "step: the optimizer is in evaluation mode, where nothing is perturbed; call "
                "train() first"
            )
        loss = None if closure is None else self._evaluated(closure)
        self._return()
        steps = self.safety.step_count
        inside = None
        try:
            if self.rho > 0 and self._moves():
                self.safety.before_step(self._params())
                inside = self._inside()
            self.base_optimizer.step()
        finally:  # where the step or a refresh raises, the parameters are held again as well
            if self.safety.step_count > steps and is_finite(inside):
                self._ascent.remember(inside)
            self._look_ahead()
        return loss

    def _evaluated(self, closure: Callable[[], float]) -> float:
        """The loss and its gradients; before the first step the aligned model is measured first."""
        params = self._params()
        if largest_learning_rate(self) > 0:
            self.safety.before_step(params)
        with torch.enable_grad():
            return closure()

    @contextmanager
    def _perturbed(self, inside: Tensor | None) -> Iterator[None]:
        """The second of two passes: at θ + ε, without gradients at the beginning."""
        if inside is not None:
            self._hold(self._ascent.perturbation(inside))
        try:
            self.zero_grad()
            yield
        finally:
            self._held.release(overwrite=True)
        made = [p.grad for p in self._params() if p.grad is not None]
        self._of_second_pass = min(made, key=Tensor.numel, default=None)

    def _second_pass_made(self) -> bool:
        """Whether the present gradients are those of a second pass."""
        made = self._of_second_pass
        return made is not None and any(p.grad is made for p in self._params())

    def _inside(self) -> Tensor | None:
        """Uᵀg of the loss that is minimised, shape ``(k,)``; None without a subspace."""
        self._ascent.carry(self._params())
        return self._ascent.coordinates(self.param_groups, self._params())

    def _look_ahead(self) -> None:
        """In training with ``lookahead``, hold the parameters at θ + ε."""
        if self.mode == "lookahead" and self.training and not self._held:
            self._ascent.carry(self._params())
            self._hold(self._ascent.perturbation())

    def _hold(self, perturbation: Tensor | None) -> None:
        """Hold the parameters at θ + ε; they stay at θ where ε has no direction."""
        if perturbation is not None:
            assert self.safety.subspace is not None
            self._held.hold(self.safety.subspace, self._params(), perturbation)

    def _return(self) -> None:
        """Return the parameters to θ, unless someone else has written to them."""
        written = self._held.release()
        if written:
            raise RuntimeError(
                f"params: {written} parameters were written to while they were held perturbed; "
                "they stay as written, the others are unperturbed. Call eval() before you change "
                "parameters, and train() afterwards"
            )

    def _params(self) -> list[Tensor]:
        return spanned_parameters(self.base_optimizer, self.safety)

    def _moves(self) -> bool:
        """Whether the next step moves protected parameters."""
        moving = any(p.grad is not None for p in self._params())
        return moving and largest_learning_rate(self) > 0

    def _add_state(self, state: dict[str, Any]) -> None:
        if self.safety.active:
            self._ascent.add_state(state)
            if "safety" not in state:  # hidden from those who drop it
                hide(state, "sam")

    def _check_state(self, state: dict[str, Any]) -> None:
        if self.safety.active:
            self._ascent.check_state(state)

    def _take_state(self, state: dict[str, Any]) -> None:
        self._held.release()  # parameters that were written to have been loaded already
        if self.safety.active:
            self._ascent.take_state(state)


def _check_arguments(rho: float, mode: str, ascent: str, beta: float, protection: str) -> None:
    one_of("mode", mode, get_args(Evaluation))
    one_of("ascent", ascent, get_args(Ascent))
    one_of("protection", protection, get_args(Mode))
    if not (isinstance(rho, (int, float)) and 0 <= rho < math.inf):
        raise ValueError(f"rho={rho!r}: expected the length of the perturbation, at least 0")
    if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
        raise ValueError(f"beta={beta!r}: expected a decay rate, 0 <= beta < 1")
