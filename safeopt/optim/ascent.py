"""Which way `SafetySAM` perturbs the parameters, and what it remembers from step to step.

ε = ρ·U e with a unit vector e in the k coordinates of the safety subspace. Everything here is
arithmetic on k numbers.

**ascent="task"**: e = m/‖m‖ with m = Uᵀg climbs the task loss inside the subspace. To first order

    L(θ + ε) = L(θ) + gᵀε = L(θ) + ρ‖Pg‖,      ∇L(θ + ε) ≈ g + ρ H P g/‖Pg‖ = ∇(L + ρ‖Pg‖)

so the step also descends ‖Pg‖, the force with which the task pushes into the subspace (condition 2
of the Alignment Instability Condition). That force grows at the rate of the coupling, UᵀHg: under
gradient flow of L + ρ‖Pg‖ in one direction u, with s = uᵀg,

    ṡ = −uᵀHg − ρ‖Hu‖² sign(s)

Where ρ‖Hu‖² > |uᵀHg| (the coupling is overcome) s slides along 0 and the drift ċ = −s that makes
c quadratic in time is gone. A side effect remains: on the sliding surface sign(s) averages
σ = −uᵀHg/(ρ‖Hu‖²), and −ρH u σ has itself a component in u, so that

    ċ = uᵀHu · uᵀHg / ‖Hu‖²

a drift linear in time where the task is curved along u: the task gradient's component stays zero
because c moves. The shared map takes this out, as it lies in the subspace.

**ascent="safety"**: e = ∇Â(c)/‖∇Â(c)‖, ∇Â(c) = b + Λc, climbs the alignment loss's surrogate. The
step evaluates the task where alignment is worse by ρ‖∇Â‖, and comes to rest where that point is
optimal for the task: ∇L(θ + ε) = 0, θ = θ* − ρUe, whose alignment loss is lower by ρ‖∇Â‖ than that
of the task's optimum θ*. It is a safety margin of length ρ. To first order it adds −ρHUe to the
velocity: an immediate pull −ρeᵀUᵀHUe down the alignment loss, where the task is curved along Ue.
Where it is not, nothing pulls, and the minimised term ρ gᵀUe even favours a task slope that points
out of the safe region: the drift's acceleration along Ue grows by ρ‖HUe‖² instead of vanishing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from safeopt.curvature.subspace import SafetySubspace
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.state import saved_eigenvalues
from safeopt.rows import row_dtype

Ascent = Literal["task", "safety"]
_KEY = "sam"


class SubspaceAscent:
    """The perturbation inside the subspace.

    Args:
        geometry: whose subspace it lies in.
        kind: what is climbed.
        rho: ρ, its length.
        beta: decay rate of the average of past Uᵀg, which a refresh carries over to the new basis
            as U_newᵀU_old m; None keeps the last Uᵀg alone, and none over a refresh.
    """

    def __init__(
        self, geometry: SafetyGeometry, kind: Ascent, rho: float, beta: float | None
    ) -> None:
        self._geometry = geometry
        self._kind = kind
        self._rho = rho
        self._beta = beta
        self._momentum: Tensor | None = None
        self._subspace: SafetySubspace | None = None  # in whose basis the momentum is

    def coordinates(
        self, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor]
    ) -> Tensor | None:
        """Uᵀg of the loss that is minimised, shape ``(k,)``; None without a subspace.

        Args:
            groups: the optimizer's; those with ``maximize=True`` minimise the loss's negative.
            params: the protected parameters, with their gradients.

        Raises:
            TypeError: if a gradient is sparse.
        """
        climbing = {id(p) for group in groups if group.get("maximize") for p in group["params"]}
        gradients = [
            p.grad.neg() if p.grad is not None and id(p) in climbing else p.grad for p in params
        ]
        if any(g is not None and g.is_sparse for g in gradients):
            raise TypeError("params: SafetySAM does not support sparse gradients")
        if self._subspace is None:
            return None
        return self._subspace.basis.coordinates(gradients)

    def perturbation(self, inside: Tensor | None = None) -> Tensor | None:
        """ρ e, shape ``(k,)``; None where there is no direction.

        Args:
            inside: the Uᵀg to climb; None takes the remembered one.
        """
        subspace = self._geometry.subspace
        if subspace is None or self._rho == 0:
            return None
        climbed = self._momentum if inside is None else inside
        if self._kind == "safety":
            position = self._geometry.vectors()["position"]
            assert position is not None
            climbed = subspace.surrogate.slope(position)
        if not is_finite(climbed) or not bool(climbed.any()):
            return None
        return climbed * (self._rho / climbed.norm())

    def remember(self, inside: Tensor) -> None:
        """Take this step's Uᵀg into the average, or instead of the last one."""
        if self._beta is None:
            self._momentum = inside
            return
        past = torch.zeros_like(inside) if self._momentum is None else self._momentum
        self._momentum = self._beta * past + (1 - self._beta) * inside

    def change(self, inside: Tensor) -> float | None:
        """‖Λ^½(Uᵀg − Uᵀg of the last step)‖; None if there is none in this basis."""
        if self._momentum is None or self._subspace is None:
            return None
        weights = self._subspace.eigenvalues.abs().sqrt()
        return float((weights * (inside - self._momentum)).norm())

    def carry(self, params: Sequence[Tensor]) -> None:
        """After a refresh: the momentum's coordinates in the new basis."""
        old, new = self._subspace, self._geometry.subspace
        self._subspace = new
        if self._momentum is None or old is None or new is None or old is new:
            return
        if self._beta is None:  # a difference of gradients needs both in the same basis
            self._momentum = None
            return
        spread = [torch.zeros_like(p, dtype=row_dtype(p)) for p in params]
        old.basis.expand_into(spread, self._momentum)
        self._momentum = new.basis.coordinates(spread)

    def add_state(self, state: dict[str, Any]) -> None:
        """Put what is remembered into an optimizer's state."""
        momentum = None if self._momentum is None else self._momentum.clone()
        state[_KEY] = {"momentum": momentum}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that does not fit.

        Raises:
            ValueError: naming the entry.
        """
        if not (isinstance(state.get(_KEY), dict) and "momentum" in state[_KEY]):
            raise ValueError(
                'state_dict: it has no "sam" entry with a "momentum"; it was not saved by SafetySAM'
            )
        momentum = state[_KEY]["momentum"]
        if momentum is None:
            return
        if not (isinstance(momentum, Tensor) and bool(momentum.isfinite().all())):
            raise ValueError('state_dict["sam"]["momentum"]: expected finite numbers')
        eigenvalues = saved_eigenvalues(state.get("safety"))
        if eigenvalues is not None and momentum.shape != eigenvalues.shape:
            raise ValueError(
                f'state_dict["sam"]["momentum"]: shape {tuple(momentum.shape)}, expected '
                f"{tuple(eigenvalues.shape)}"
            )

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a checked state, after the geometry has."""
        self._subspace = self._geometry.subspace
        momentum = state[_KEY]["momentum"]
        self._momentum = None
        if momentum is not None and self._subspace is not None:
            self._momentum = momentum.detach().to(self._subspace.eigenvalues).clone()


def is_finite(values: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there are values and all of them are finite."""
    return values is not None and bool(values.isfinite().all())
