"""Per-example gradients g_i = ∇ℓ_i of m safety examples, from one forward and one backward pass.

Hooks record a module's input ``a`` and the gradient ``b`` of its output. The examples never mix
inside a module, so each one's gradient can be read off locally:

- linear layer (LoRA's two factors are linear layers): ``∂ℓ_i/∂W = Σ_t b_it a_itᵀ``;
- embedding: row ``v`` is ``Σ_{t: token_it = v} b_it``;
- any other module with parameters of its own (norms, GPT-2's transposed linear, …): a
  vector-Jacobian product of that module alone, for each example.

The sum over the examples is checked against autograd's total gradient. Parameters where the two
differ, or whose layer's input and output do not hold one row an example (a layer works on flattened
tokens, mixes examples, or a parameter is used outside its own module), are computed by a loop over
the examples instead, and remembered. Mixing in a layer without parameters of its own leaves the sum
as it is and is not noticed: the rows are then each example's share of the total gradient.

Cost: one forward and one backward pass of the batch, and ``m`` numbers for each parameter.

`safeopt.factored_gradients` keeps a and b instead of the m matrices of linear layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from safeopt.rows import row_dtype as row_dtype

logger = logging.getLogger("safeopt")

# A wrong gradient is off by a factor; rounding stays far below this share of the gradient's norm.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}


class PerExampleGradients(NamedTuple):
    """Losses and gradients of m examples.

    Attributes:
        losses: shape ``(m,)``, detached.
        rows: one tensor for each parameter, shape ``(m, *p.shape)``, in float32 (float64 for
            float64 parameters); zeros where the losses do not depend on the parameter.
    """

    losses: Tensor
    rows: list[Tensor]


def per_example_gradients(
    losses: Callable[[], Tensor],
    single_losses: Sequence[Callable[[], Tensor]],
    model: nn.Module,
    params: Sequence[Tensor],
    looped: set[int],
) -> PerExampleGradients:
    """Compute the gradient of each example's loss with respect to ``params``.

    Args:
        losses: runs the model on the whole batch and returns the losses, shape ``(m,)``.
        single_losses: m functions, each running the model on one example; shape ``(1,)``. They are
            called only for parameters that the hooks cannot serve.
        model: the module that holds ``params``.
        params: parameters that require a gradient.
        looped: indices into ``params`` known to need the loop over examples; extended in place.

    Returns:
        Losses and gradients, see `PerExampleGradients`.
    """
    with Recorder(model, params, len(single_losses), skip=looped) as recorder:
        values = losses()
        total = torch.autograd.grad(values.sum(), list(params), allow_unused=True)
    rows = [recorder.row(index) for index in range(len(params))]
    for index, (gradient, row) in enumerate(zip(total, rows, strict=True)):
        if index not in looped and gradient is not None:
            recorder.check(index, row.sum(0), gradient, torch.linalg.vector_norm(row), looped)
    for index, row in looped_rows(single_losses, params, looped).items():
        rows[index] = row
    return PerExampleGradients(values.detach(), rows)


def looped_rows(
    single_losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor], looped: set[int]
) -> dict[int, Tensor]:
    """Gradients of a few parameters by one pass for each example."""
    rows = {
        i: params[i].new_zeros((len(single_losses), *params[i].shape), dtype=row_dtype(params[i]))
        for i in sorted(looped)
    }
    if not rows:
        return rows
    for example, single in enumerate(single_losses):
        gradients = torch.autograd.grad(
            single().sum(), [params[i] for i in rows], allow_unused=True
        )
        for row, gradient in zip(rows.values(), gradients, strict=True):
            if gradient is not None:
                row[example] = gradient
    return rows


class Recorder(AbstractContextManager["Recorder"]):
    """Hooks that add each module's share of the per-example gradients to ``rows``."""

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], examples: int, skip: set[int]
    ) -> None:
        self.examples = examples
        self.mixed: set[int] = set()
        self.rounded = False  # a layer ran in half precision, by itself or under autocast
        self._params = params
        self._rows: dict[int, Tensor] = {}
        wanted = {id(p): index for index, p in enumerate(params) if index not in skip}
        self._owned: dict[nn.Module, dict[str, int]] = {}
        for module in model.modules():
            own = {
                name: wanted[id(p)]
                for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(p) in wanted
            }
            if own:
                self._owned[module] = own
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaying = False

    def __enter__(self) -> Recorder:
        for module in self._owned:
            self._handles.append(module.register_forward_hook(self._forward, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def row(self, index: int) -> Tensor:
        """The dense rows of a parameter, zeros at first."""
        if index not in self._rows:
            p = self._params[index]
            shape = (self.examples, *p.shape)
            self._rows[index] = torch.zeros(shape, dtype=row_dtype(p), device=p.device)
        return self._rows[index]

    def check(
        self, index: int, summed: Tensor, gradient: Tensor, scale: Tensor, looped: set[int]
    ) -> None:
        """Put a parameter into ``looped`` where its rows' sum is not the total gradient."""
        gap = torch.linalg.vector_norm(summed - gradient.to(summed.dtype))
        exact = gradient.dtype == summed.dtype and not self.rounded
        tolerance = _AGREEMENT[summed.dtype] if exact else 0.1
        if index in self.mixed or gap > tolerance * scale + torch.finfo(gradient.dtype).tiny:
            looped.add(index)
            logger.info("per-example gradients of parameter %d need a loop over examples", index)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._replaying or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor):
            self.mixed.update(self._owned[module].values())
        elif output.requires_grad:
            self._watch(output, module, args, kwargs)

    def _watch(self, output: Tensor, module: nn.Module, args: Any, kwargs: Any) -> None:
        output.register_hook(lambda b: self._record(module, args, kwargs, b))

    @torch.no_grad()
    def _record(self, module: nn.Module, args: Any, kwargs: Any, b: Tensor) -> None:
        own = self._owned[module]
        self.rounded |= b.dtype.itemsize < 4
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not first.shape[0] == b.shape[0] == self.examples:
            self.mixed.update(own.values())
        elif type(module).forward is nn.Linear.forward:
            self._linear(own, first, b)
        elif type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq):
            self._embedding(module, own["weight"], first, b)
        else:
            self._local_products(module, own, args, kwargs, b)

    def _linear(self, own: dict[str, int], a: Tensor, b: Tensor) -> None:
        b = b.reshape(self.examples, -1, b.shape[-1])
        if "weight" in own:
            rows = self.row(own["weight"])
            a = a.reshape(self.examples, -1, a.shape[-1])
            rows.baddbmm_(b.transpose(1, 2).to(rows.dtype), a.to(rows.dtype))
        if "bias" in own:
            self.row(own["bias"]).add_(b.sum(1))

    def _embedding(self, module: nn.Embedding, index: int, tokens: Tensor, b: Tensor) -> None:
        rows = self.row(index)
        flat_b = b.reshape(self.examples, -1, b.shape[-1]).to(rows.dtype)
        tokens = tokens.reshape(self.examples, -1)
        if module.padding_idx is not None:
            flat_b = flat_b * (tokens != module.padding_idx).unsqueeze(-1)
        for example in range(self.examples):
            rows[example].index_add_(0, tokens[example], flat_b[example])

    def _local_products(
        self, module: nn.Module, own: dict[str, int], args: Any, kwargs: Any, b: Tensor
    ) -> None:
        weights = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        for example in range(self.examples):
            leaves = {name: weights[name].clone().requires_grad_() for name in own}
            inputs, named = tree_map(partial(self._one, example=example), (args, kwargs))
            self._replaying = True  # the replay below runs this module's hooks again
            try:
                with torch.enable_grad():
                    output = functional_call(module, {**weights, **leaves}, inputs, named)
            finally:
                self._replaying = False
            part = b[example : example + 1]
            if output.shape != part.shape:  # an argument could not be cut down to one example
                self.mixed.update(own.values())
                return
            if not output.requires_grad:  # the module does not use the parameters it owns
                continue
            gradients = torch.autograd.grad(output, list(leaves.values()), part, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    self.row(own[name])[example] += gradient

    def _one(self, value: Any, example: int) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.examples:
            return value[example : example + 1].detach()
        return value
