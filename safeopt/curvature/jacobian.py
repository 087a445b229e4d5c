"""Products JᵀM J·v with the Jacobian J of a model's outputs z, by three backends.

They are the backends of `products`, for generalised Gauss-Newton matrices. M is symmetric, ignores
a constant added to all classes of a token, and acts on one tangent of the outputs at a time.
Neither J nor M is formed.

- ``"double"``: J·v = ∂⟨Jᵀu, v⟩/∂u for a dummy u, in which Jᵀu is linear. One pass a product through
  the graph of Jᵀu and one backward pass, both on graphs that are built once.
- ``"forward"``: forward-mode tangents. One forward pass with tangents and one backward pass a
  product.
- ``"finite"``: central differences of z. Three forward passes and one backward pass a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from safeopt.curvature.products import (
    Kind,
    Product,
    Site,
    filled,
    tangents_of,
    values_of,
    with_parameters,
)

Outputs = Callable[[nn.Module], Tensor]
Metric = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs z and a tangent t, both detached and of equal shape, to M(z)·t."""


def gauss_newton_product(kind: Kind, site: Site, outputs: Outputs, metric: Metric) -> Product:
    """Make ready for products with JᵀM J.

    Args:
        kind: the backend.
        site: model and parameters.
        outputs: z as a function of the model; may be called again at each product.
        metric: M.
    """
    if kind == "finite":
        return _finite(site, outputs, metric)
    with sdpa_kernel(SDPBackend.MATH):
        site.counts.forward += 1
        z = outputs(site.model)
    tangent = (_double if kind == "double" else _forward)(site, outputs, z)

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            cotangent = metric(z.detach(), tangent(vector).detach())
            site.counts.backward += 1
            parts = torch.autograd.grad(
                z, site.params, cotangent, retain_graph=True, allow_unused=True
            )
        return filled(parts, site.params)

    return product


def _double(site: Site, outputs: Outputs, z: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    dummy = torch.zeros_like(z, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        site.counts.backward += 1
        pulled = torch.autograd.grad(z, site.params, dummy, create_graph=True, allow_unused=True)
    live = [(i, g) for i, g in enumerate(pulled) if g is not None]

    def tangent(vector: Sequence[Tensor]) -> Tensor:
        site.counts.double_backward += 1
        (result,) = torch.autograd.grad(
            [g for _, g in live], dummy, [vector[i].to(g.dtype) for i, g in live], retain_graph=True
        )
        return result

    return tangent


def _forward(site: Site, outputs: Outputs, z: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    function = with_parameters(site, outputs)

    def tangent(vector: Sequence[Tensor]) -> Tensor:
        site.counts.forward += 1
        site.counts.tangent += 1
        with torch.no_grad():
            return jvp(function, (values_of(site),), (tangents_of(site, vector),))[1]

    return tangent


def _finite(site: Site, outputs: Outputs, metric: Metric) -> Product:
    def evaluate() -> list[Tensor]:
        site.counts.forward += 1
        z = outputs(site.model)
        # Without the mean of a token's log-probabilities, about −log V, which M ignores and which
        # would hide how much the rest has changed.
        return [z - z.mean(-1, keepdim=True)]

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        (tangent,) = site.differences.along(vector, evaluate)

        def weighted(model: nn.Module) -> Tensor:
            z = outputs(model)
            return (z * metric(z.detach(), tangent)).sum()

        return site.gradient(weighted)

    return product
