"""PreconditionedSGD: SGD that is slow where the alignment loss is sharp.

With the momentum direction d and the safety curvature F = UΛUᵀ, one step is

    θ ← θ − η (I + UΛUᵀ/τ)⁻¹ d

By the Woodbury identity the inverse is a correction in k dimensions,

    (I + UΛUᵀ/τ)⁻¹ = I − U M Uᵀ,     M = Λ^½ (τI + Λ^½ UᵀU Λ^½)⁻¹ Λ^½

so that the step is plain SGD followed by θ += η U M Uᵀd. UᵀU is the stored basis's own Gram
matrix: the inverse is exact for the basis as it is stored, also where storage in few bits has cost
it its orthonormality. The direction is preconditioned, not the gradient: the momentum buffer holds
raw gradients, and after a refresh all of it obeys the new curvature.

**What it does to the drift.** For orthonormal U the coordinates move as ċ = −(I + Λ/τ)⁻¹Uᵀg. The
drift c(t) = ċ₀t + ½c̈t² of gradient flow is divided by 1 + λᵢ/τ in direction i, its alignment loss
by the square of that, and

    λᵢ · (τ/(τ + λᵢ))² ≤ τ/4     for every λᵢ ≥ 0:

whatever the spectrum, drift meets an effective curvature of at most τ/4.

**τ's default.** The map "damp" divides the excursion by 1 + κλᵢ/λ̄ at every step (λ̄ is the mean
eigenvalue), so a velocity u in direction i comes to rest at u·λ̄/(κλᵢ). A preconditioner has no
memory: after the R steps of a refresh interval, at whose end the subspace is renewed and lost
alignment restored, it has let through R·u/(1 + λᵢ/τ). Both are equal, for λᵢ ≫ τ, with

    τ = λ̄ / (κR),     κ = ``damping``,  R = ``refresh.every``

which depends neither on the scale of the loss nor on that of the parameters. With the defaults
κ = 1 and R = 200 a direction of mean curvature is slowed down 201 times.

**Acceleration.** ``mode="acceleration"`` then removes what remains of c̈: ċ₀ is read from the first
step after a refresh, where it has been divided by 1 + Λ/τ already, and is kept until the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

from safeopt.curvature.bases import Storage
from safeopt.curvature.refresh import RefreshPolicy
from safeopt.optim.config import Curvature, Mode, SafetyConfig, one_of
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.measurement import Measurement
from safeopt.optim.preconditioner import Indefinite, SafetyPreconditioner
from safeopt.optim.protection import OnRefreshError, attach, restore
from safeopt.optim.sgd_update import multi_tensor_update, single_tensor_update
from safeopt.probe import SafetyProbe
from safeopt.rows import row_dtype


class PreconditionedSGD(torch.optim.SGD):
    r"""SGD whose direction is divided by the safety curvature.

    .. code-block:: text

        before step 1:        a_0, U, Λ  from a few safety examples at the aligned model
        at every step t:      g   = −∇L if maximize else ∇L
                              b   = g at the first step, then momentum·b + (1 − dampening)·g
                              d   = g + momentum·b if nesterov else b       (g without momentum)
                              θ   = (1 − lr·weight_decay)·θ − lr·d
                              θ  += lr·U M Uᵀd                   i.e. −lr·(I + UΛUᵀ/τ)⁻¹d in all
                              θ  += w ⊙ (θ_0 − θ)                safeopt.optim.elastic
                              θ  += U(map(c) − c)
        at a refresh:         as `ProjectedAdamW`

    A group's learning rate multiplies its part of the preconditioned direction, so that this leaves
    a group with ``lr=0`` where it is. The pull, the map (none by default), refreshes and restoring
    move all protected groups: to keep one still, use ``protect=False`` or ``requires_grad_(False)``
    before the first step. A protected parameter without a gradient counts as one with a gradient of
    zero: its part of U M Uᵀd moves it, and the pull, where there is one, brings it back.

    Args:
        params: parameters, or groups of them. A group with ``protect=False`` is trained by plain
            SGD.
        lr: learning rate.
        momentum: decay rate of the momentum.
        dampening: of the momentum.
        weight_decay: decoupled, as in AdamW: it goes neither into the momentum nor through the
            preconditioner, which would keep it away from the safety subspace.
        nesterov: Nesterov momentum.
        probe: the safety examples; its model holds ``params``.
        tau: τ > 0 in the unit of the eigenvalues; by default λ̄/(``damping``·``refresh.every``).
        indefinite: negative eigenvalues λ, which a Hessian may have: ``"abs"`` takes \|λ\|, the
            scale on which the alignment loss changes either way (saddle-free Newton, Dauphin et al.
            2014); ``"clip"`` takes 0 and leaves such a direction to SGD.
        rank: see `SafetyConfig`, as for all arguments up to ``seed``.
        mode: the map c → c⁺ after the step; ``"none"`` is the preconditioner alone.
            ``"project"`` overrides it: the step inside the subspace is taken back in full.
        damping: strength κ of the default τ and of mode ``"damp"``; 0 is ``torch.optim.SGD`` bit
            for bit (with decoupled weight decay), and no safety pass is made.
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
        maximize: as in SGD; the alignment loss is kept low all the same.
        foreach: as in SGD.
        differentiable: not supported.
        fused: not supported: the direction is needed before the parameters move.

    Attributes:
        safety: the `SafetyGeometry`: history, measured, predicted, coupling, passes.
        tau: as given; None stands for the default.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if ``probe`` is not a `SafetyProbe`; in ``step``, for sparse gradients.

    Cost: a step adds 2·k·n multiplications for the preconditioner to the 3·k·n of the geometry, a
    refresh 2·k²·n for UᵀU. Memory: k float32 numbers for each protected parameter, three more with
    ``elastic``; one more while UᵀU is computed, or in every step if protected groups differ in
    their learning rates.

    Source: Frangella, Rathore, Zhao, Udell 2022, "SketchySGD" (arXiv 2211.08597), where the
    curvature is the task's; here it is the safety curvature of Springer et al. 2026
    (arXiv 2602.15799).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        probe: SafetyProbe,
        tau: float | None = None,
        indefinite: Indefinite = "abs",
        rank: int = SafetyConfig.rank,
        mode: Mode = "none",
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
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, value in (("differentiable", differentiable), ("fused", fused)):
            if value:
                raise ValueError(
                    f"{name}=True: PreconditionedSGD does not support it; leave it False"
                )
        if tau is not None and not (isinstance(tau, (int, float)) and 0 < tau < math.inf):
            raise ValueError(
                f"tau={tau!r}: expected a positive number, or None for the default; damping=0 "
                "switches the preconditioner off"
            )
        one_of("indefinite", indefinite, get_args(Indefinite))
        config = SafetyConfig(
            rank=rank,
            mode=mode,
            damping=damping,
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
        self.tau = tau
        relative = config.damping * config.refresh.every
        self._preconditioner = SafetyPreconditioner(tau, relative, indefinite)
        geometry = SafetyGeometry(probe, config)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
        )
        self.safety = geometry
        attach(self, geometry, on_refresh_error)

    @_disable_dynamo  # the k-dimensional part reads numbers on the host
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: clears the gradients, computes them anew and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        directions: dict[Tensor, Tensor] = {}
        # All groups are looked at before the first one moves.
        members = [self._init_group(group) for group in self.param_groups]
        for group, (params, grads, buffers) in zip(self.param_groups, members, strict=True):
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, differentiable=False)
            update = multi_tensor_update if foreach else single_tensor_update
            moved = update(params, grads, buffers, group)
            directions.update(zip(params, moved, strict=True))
            if group["momentum"] != 0:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer
        if directions:
            self._correct(directions)
        return loss

    def restore(self) -> Measurement:
        """Measure the alignment loss now and restore examples that are lost.

        Returns:
            The measurement, with the loss before and after; see `ProjectedAdamW.restore`.
        """
        return restore(self, self.safety)

    def _init_group(  # type: ignore[override]
        self, group: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """The group's parameters that have a gradient, their gradients and momentum buffers."""
        params, grads, buffers = [], [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise TypeError("params: PreconditionedSGD does not support sparse gradients")
            params.append(p)
            grads.append(p.grad)
            buffers.append(self.state[p].get("momentum_buffer") if group["momentum"] else None)
        return params, grads, buffers

    def _correct(self, directions: dict[Tensor, Tensor]) -> None:
        """Turn the step −ηd just taken into −η(I − U M Uᵀ)d."""
        subspace = self.safety.subspace
        if subspace is None or subspace.rank == 0:
            return
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        params = self.safety.spanned
        inside = subspace.basis.coordinates([directions.get(p) for p in params])
        if not bool(inside.isfinite().all()):
            return  # the step is not protected, see `safeopt.optim.protection`
        change = self._preconditioner.matrix(subspace, params) @ inside
        if len({rates[p] for p in params}) == 1:
            subspace.basis.expand_into(params, rates[params[0]] * change)
            return
        parts = [torch.zeros_like(p, dtype=row_dtype(p)) for p in params]
        subspace.basis.expand_into(parts, change)
        for p, part in zip(params, parts, strict=True):
            p.add_(part.to(p.dtype), alpha=rates[p])

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry of the preconditioner, beside the protected optimizer."""
        own = {"tau": self.tau, "_preconditioner": self._preconditioner}
        return {**super().__getstate__(), **own}
