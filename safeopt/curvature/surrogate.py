"""The quadratic model of the alignment loss in the k coordinates of the safety subspace.

Around the anchor θ_r, with c = Uᵀ(θ − θ_r):

    Â(c) = a_r + bᵀc + ½ cᵀΛc,        b = Uᵀ∇A(θ_r)

Everything here is arithmetic on k numbers in float64; nothing touches the model.

Maps c → c⁺ applied after a base optimizer's step (all are proximal steps, so that the whole is
forward-backward splitting of task loss + h(c)):

- ``project``: c⁺ = c*, the proximal map of one point's indicator function;
- `damp`: c⁺ = argmin_x ½‖x − c‖² + κ/2 (x − c*)ᵀ Λ (x − c*), with κ = η/τ;
- `limit_to_budget`: the nearest c⁺ with Â(c⁺) ≤ a_r + budget;
- `remove_acceleration`: only the drift that was there at the start is kept (the paper's
  second-order term removed, and nothing else).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Â(c) = value + gradientᵀc + ½·cᵀ diag(eigenvalues) c.

    Attributes:
        value: a_r, the alignment loss measured at the anchor.
        gradient: b, shape ``(k,)``, float64.
        eigenvalues: the diagonal of Λ, shape ``(k,)``, float64, not negative.
    """

    value: float
    gradient: Tensor
    eigenvalues: Tensor

    def predict(self, c: Tensor) -> float:
        """Return Â(c) for coordinates ``c (k,)``."""
        quadratic = 0.5 * (self.eigenvalues * c * c).sum()
        return self.value + float(self.gradient @ c + quadratic)

    def slope(self, c: Tensor) -> Tensor:
        """Return ∇Â(c) = b + Λc, shape ``(k,)``."""
        return self.gradient + self.eigenvalues * c

    def moved(self, step: Tensor, value: float) -> Surrogate:
        """The same quadratic around θ_r + U·step, where A was measured as ``value``."""
        return replace(self, value=value, gradient=self.slope(step))


def damp(c: Tensor, target: Tensor, curvature: Tensor, strength: float) -> Tensor:
    """Proximal map of ½κ(c − c*)ᵀ Λ (c − c*).

    Args:
        c: shape ``(k,)``.
        target: c*, shape ``(k,)``.
        curvature: Λ's diagonal, shape ``(k,)``, not negative.
        strength: κ = η/τ ≥ 0; 0 changes nothing, ∞ is `project`.
    """
    weight = strength * curvature
    return (c + weight * target) / (1 + weight)


def remove_acceleration(previous: Tensor, drift: Tensor) -> Tensor:
    """Replace the step inside the subspace by the first-order drift: c⁺ = c_previous + drift.

    Under gradient flow θ̇ = −g(θ) the coordinates c = Uᵀ(θ − θ_r) obey

        ċ = −Uᵀg,      c̈ = −UᵀHθ̇ = UᵀHg,      c(t) = ċ₀t + ½c̈t² + O(t³)

    ċ₀ is what a first-order analysis sees, and zero where condition 2 of the Alignment Instability
    Condition holds; c̈ is condition 3's coupling, which bends the trajectory into the subspace and
    makes the alignment loss ½cᵀΛc grow as t⁴. In steps of length η, c_t − c_{t−1} = ηċ₀ + O(η²)
    and the second difference is

        (c_{t+1} − c_t) − (c_t − c_{t−1}) = η²UᵀHg + O(η³)

    Repeating the first step after the refresh, ``drift`` = ηċ₀, removes every second difference
    since then and nothing else: c stays at ηtċ₀, and the alignment loss grows as t² at most. The
    base optimizer's step takes part in ċ₀ as it is: with Adam, a perturbed gradient or a
    preconditioner it is that optimizer's first-order drift, not −Uᵀg.

    Args:
        previous: c⁺ after the last step, shape ``(k,)``.
        drift: c⁺ of the first step after the refresh, shape ``(k,)``.

    Source: the coupling is condition 3 of Springer et al. 2026 (arXiv 2602.15799); γ is measured by
    `safeopt.SafetyGeometry.observe_gradient`.
    """
    return previous + drift


def limit_to_budget(c: Tensor, surrogate: Surrogate, budget: float) -> Tensor:
    """The point nearest to ``c`` with Â(c⁺) ≤ a_r + budget.

    The Lagrange condition gives c⁺(μ) = (I + μΛ)⁻¹(c − μb); Â(c⁺(μ)) falls with μ, so that one
    bracketed root-finding yields μ.

    Args:
        c: shape ``(k,)``.
        surrogate: the quadratic model.
        budget: accepted rise of the alignment loss over the anchor's, at least 0.

    Returns:
        Shape ``(k,)``; ``c`` itself where it is within the budget.
    """
    limit = surrogate.value + budget
    if surrogate.predict(c) <= limit:
        return c

    def point(mu: float) -> Tensor:
        return (c - mu * surrogate.gradient) / (1 + mu * surrogate.eigenvalues)

    high = 1.0
    while surrogate.predict(point(high)) > limit:
        high *= 4
        if high > 1e18:  # only the anchor itself is left (budget 0 and no descent direction)
            return torch.zeros_like(c)
    low = 0.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if surrogate.predict(point(middle)) <= limit else (middle, high)
    return point(high)
