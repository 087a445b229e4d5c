"""Products of a loss's Hessian H with vectors, by three backends.

- ``"double"``: H·v = ∂⟨∇ℓ, v⟩/∂θ by a second backward pass. One pass a product through the graph
  of ∇ℓ, which is built once and shared. Needs the memory of that graph and operations that can be
  differentiated twice.
- ``"forward"``: H·v = ∂/∂t ∇ℓ(θ + tv) by forward-mode tangents. A forward and a backward pass with
  tangents for each product. Needs forward-mode rules.
- ``"finite"``: central differences of gradients, see `safeopt.curvature.differences`. Two forward
  and two backward passes a product, more where the step size is corrected. Needs gradients only:
  fused attention, 4-bit bases, checkpointing of both kinds.

Autograd gives no gradient to an embedding's padding row. The last two follow a vector's entries
there all the same, so that where embeddings are among the parameters and that token is read, their
matrix is not quite symmetric: by 2% on SmolLM2. Only ``"double"`` leaves the row out on both sides.

Nor are differences right where a step goes over kinks, as of ReLU: a kink adds its jump, divided by
the step. On small OPT models Hessian products were off by up to 25 times their length, those of the
GGN by up to 3%, at times without a sign of it on the examples that a backend is tried on.
Derivatives do not see the jumps: take one of the first two.

The first two compute attention by its plain formula ("math"); fused kernels have no second
derivative. Measured with one thread on a Llama with 1.05M LoRA parameters, 256 tokens: gradient
0.75 s, ``"double"`` 0.88 s a product after 0.90 s for the graph, ``"forward"`` 2.7 s. k products on
one graph are taken one after the other: vectorised over the graph (``is_grads_batched``) they took
1.3 times as long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from safeopt.curvature.differences import Differences, norm, rounding_unit
from safeopt.per_example import row_dtype

logger = logging.getLogger("safeopt")

Kind = Literal["double", "forward", "finite"]
KINDS: tuple[Kind, ...] = ("double", "forward", "finite")
# How far a backend may be from finite differences on a few examples before it is called wrong.
# Finite differences in half precision are too coarse to tell more than a sign or a missing part.
_AGREEMENT, _COARSE_AGREEMENT = 1e-2, 0.7
# Up to this, differences may be at fault: for a confident model they lose two or three digits more.
_DOUBTFUL = 0.1
# How near two backends are that derive the same function: to rounding.
_SAME = 1e-3


class Counts(Protocol):
    """Passes by kind, see `safeopt.curvature.operators.base.ProductCounter`."""

    forward: int
    backward: int
    double_backward: int
    tangent: int


Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""Maps a vector, one tensor for each parameter, to its product."""


@dataclass
class Site:
    """Where products are taken: a model and the parameters that count.

    Attributes:
        model: the module.
        names: the parameters' names in it.
        params: the parameters.
        counts: passes are counted here.
        through_backward: gradients need ``.backward()``, because reentrant gradient checkpointing
            refuses `torch.autograd.grad`; found out at the first gradient.
        differences: finite differences on the parameters.
    """

    model: nn.Module
    names: Sequence[str]
    params: Sequence[nn.Parameter]
    counts: Counts
    through_backward: bool = False
    differences: Differences = field(init=False)

    def __post_init__(self) -> None:
        self.differences = Differences(self.model, self.params)

    def gradient(
        self, function: Callable[[nn.Module], Tensor], cotangent: Tensor | None = None
    ) -> list[Tensor]:
        """Return ∇⟨function(model), cotangent⟩: one forward and one backward pass."""
        self.counts.forward += 1
        self.counts.backward += 1
        output = function(self.model)
        if not self.through_backward:
            try:
                parts = torch.autograd.grad(output, self.params, cotangent, allow_unused=True)
                return filled(parts, self.params)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower():
                    raise
            self.through_backward = True
            self.counts.forward += 1
            output = function(self.model)
        return self._backward(output, cotangent)

    def _backward(self, output: Tensor, cotangent: Tensor | None) -> list[Tensor]:
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in leaves):
            raise RuntimeError(
                "reentrant gradient checkpointing needs .backward(), which would run the hooks "
                "that act on accumulated gradients (an optimizer in the backward pass); enable "
                'checkpointing with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        before = [p.grad for p in leaves]
        try:
            for p in leaves:
                p.grad = None
            output.backward(cotangent)
            return filled([p.grad for p in self.params], self.params)
        finally:
            for p, gradient in zip(leaves, before, strict=True):
                p.grad = gradient


def hessian_product(kind: Kind, site: Site, loss: Callable[[nn.Module], Tensor]) -> Product:
    """Make ready for products with the Hessian of ``loss(model)`` (one number).

    Args:
        kind: the backend.
        site: model and parameters.
        loss: differentiable; may be called again at each product.
    """
    build = {"double": double_backward, "forward": _forward_over_reverse, "finite": _finite}
    return build[kind](site, loss)


def double_backward(site: Site, loss: Callable[[nn.Module], Tensor]) -> Product:
    """H·v = ∂⟨∇ℓ, v⟩/∂θ; the graph of ∇ℓ is built now and kept with the result."""
    with sdpa_kernel(SDPBackend.MATH):
        site.counts.forward += 1
        site.counts.backward += 1
        first = torch.autograd.grad(
            loss(site.model), site.params, create_graph=True, allow_unused=True
        )
    # A parameter that is not used, or enters linearly and alone, has no second derivative.
    live = [(i, g) for i, g in enumerate(first) if g is not None and g.requires_grad]

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        site.counts.double_backward += 1
        if not live:
            return filled([None] * len(site.params), site.params)
        with sdpa_kernel(SDPBackend.MATH):  # checkpointing runs the forward pass again in here
            parts = torch.autograd.grad(
                [g for _, g in live],
                site.params,
                [vector[i].to(g.dtype) for i, g in live],
                retain_graph=True,
                allow_unused=True,
            )
        return filled(parts, site.params)

    return product


def _forward_over_reverse(site: Site, loss: Callable[[nn.Module], Tensor]) -> Product:
    function = with_parameters(site, loss)
    gradient = grad(lambda values: function(values))

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        site.counts.forward += 1
        site.counts.backward += 1
        site.counts.tangent += 2
        with sdpa_kernel(SDPBackend.MATH):
            tangent = jvp(gradient, (values_of(site),), (tangents_of(site, vector),))[1]
        return [part.detach() for part in tangent]

    return product


def _finite(site: Site, loss: Callable[[nn.Module], Tensor]) -> Product:
    def gradient() -> list[Tensor]:
        with torch.enable_grad():
            return site.gradient(loss)

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        return site.differences.along(vector, gradient)

    return product


def choose(kind: Kind | Literal["auto"], site: Site, build: Callable[[Kind], Product]) -> Kind:
    """Pick a backend by trying it on a few examples.

    A backend must run and agree with finite differences, as far as these agree with themselves at
    another step, or else ``double`` and ``forward`` with each other: some operations give wrong
    second derivatives without an error, and differences are wrong where there are kinks. Known
    cases are operations whose backward pass is opaque to autograd (``"double"`` leaves them out),
    and in torch 2.13 the forward-mode rule of LayerNorm's backward pass (``"forward"`` gets the
    rows of its weight wrong).

    Args:
        kind: a backend's name, or ``"auto"`` for the first of ``double``, ``forward`` and
            ``finite`` that works.
        site: model and parameters.
        build: makes the product of a backend ready on these examples.

    Returns:
        The backend; the choice of ``"auto"`` and its reason are logged.

    Raises:
        ValueError: if ``kind`` is unknown.
        RuntimeError: if the backend cannot work on this model, with the cause and the cure.
    """
    if kind != "auto" and kind not in KINDS:
        raise ValueError(f'products="{kind}": expected "auto" or one of {list(KINDS)}')
    generator = torch.Generator().manual_seed(0)
    vector = [
        torch.randn(p.shape, generator=generator, dtype=row_dtype(p), device="cpu").to(p.device)
        for p in site.params
    ]
    _clear_padding(vector, site)
    expected = _try("finite", build, vector)
    reasons = []
    for candidate in KINDS[:-1] if kind == "auto" else [kind]:
        if candidate == "finite":
            return candidate
        try:
            actual = _try(candidate, build, vector)
            gap, allowed = _distance(actual, expected), _agreement(site)
            if gap > allowed:  # the first difference is rough: judge by two at better steps
                expected = _try("finite", build, vector)
                site.differences.halve_step()
                again = _try("finite", build, vector)
                gap = min(_distance(actual, expected), _distance(actual, again))
                allowed = max(allowed, min(2 * _distance(again, expected), _DOUBTFUL))
            if gap > allowed and not _confirmed(candidate, build, vector, actual):
                raise RuntimeError(
                    f'products="{candidate}" is {gap:.1e} away from finite differences: an '
                    "operation of the model has no or a wrong rule for its second derivative. "
                    f"Cure: {_CURES[candidate]}"
                )
        except RuntimeError as error:
            if kind != "auto":
                raise
            reasons.append(str(error))
            continue
        if kind == "auto":
            reason = "; ".join(reasons) or f"it is {gap:.0e} from finite differences"
            logger.info('products="auto": took "%s" (%s)', candidate, reason)
        return candidate
    logger.info('products="auto": took "finite" (%s)', "; ".join(reasons))
    return "finite"


def _clear_padding(vector: Sequence[Tensor], site: Site) -> None:
    """Set the vector to zero at the padding rows of embeddings.

    Autograd gives them no gradient, though a model's padding token is often one that it reads, such
    as the end of a turn. Finite differences notice that the row matters: on SmolLM2 by 2%.
    """
    for module in site.model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            for v, p in zip(vector, site.params, strict=True):
                if p is module.weight:
                    v[module.padding_idx] = 0


_CURES = {
    "double": 'use products="finite", attn_implementation="eager" or "sdpa", and non-reentrant '
    "gradient checkpointing",
    "forward": 'use products="double" or "finite"',
    "finite": "make the loss differentiable once",
}


def _try(kind: Kind, build: Callable[[Kind], Product], vector: list[Tensor]) -> list[Tensor]:
    try:
        result = build(kind)(vector)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        cause = str(error).strip().split("\n")[0][:300]
        raise RuntimeError(
            f'products="{kind}" cannot work on this model: {cause}. Cure: {_CURES[kind]}'
        ) from error
    if not all(bool(torch.isfinite(part).all()) for part in result):
        raise RuntimeError(
            f'products="{kind}" gave values that are not finite. Cure: check the loss of a batch, '
            "or compute in float32"
        )
    return result


def _confirmed(
    kind: Kind, build: Callable[[Kind], Product], vector: list[Tensor], actual: list[Tensor]
) -> bool:
    """Whether the other backend that derives gives the same: differences go over kinks, then."""
    try:
        other = _try("forward" if kind == "double" else "double", build, vector)
    except RuntimeError:
        return False
    return _distance(actual, other) <= _SAME


def _agreement(site: Site) -> float:
    fine = rounding_unit(site.model) <= torch.finfo(torch.float32).eps
    return _AGREEMENT if fine else _COARSE_AGREEMENT


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖actual − expected‖ / max(‖actual‖, ‖expected‖)."""
    gap = norm([x.to(y.dtype) - y for x, y in zip(actual, expected, strict=True)])
    scale = max(norm(actual), norm(expected))
    return gap / scale if scale > 0 else 0.0


def with_parameters(
    site: Site, function: Callable[[nn.Module], Tensor]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return ``function(model)`` as a function of the parameters' values."""
    bound = _Bound(site.model, function)
    names = [f"model.{name}" for name in site.names]

    def call(values: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, functional_call(bound, dict(zip(names, values, strict=True)), ()))

    return call


class _Bound(nn.Module):
    """A function of a model as a module, so that parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Any:
        return self.function(self.model)


def values_of(site: Site) -> tuple[Tensor, ...]:
    """The parameters' values without their graph."""
    return tuple(p.detach() for p in site.params)


def tangents_of(site: Site, vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A vector in the parameters' dtypes."""
    return tuple(v.to(p.dtype) for v, p in zip(vector, site.params, strict=True))


def filled(parts: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, with zeros for those that autograd leaves out."""
    return [
        torch.zeros_like(p) if part is None else part for part, p in zip(parts, params, strict=True)
    ]
