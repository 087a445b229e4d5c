"""Per-example gradients g_i = ∇ℓ_i of m safety examples, from one forward and one backward pass.

Hooks record a module's input ``a`` and the gradient ``b`` of its output. The examples never mix
inside a module, so each one's gradient can be read off locally:

- linear layer (LoRA's two factors are linear layers): ``∂ℓ_i/∂W = Σ_t b_it a_itᵀ``;
- embedding: row ``v`` is ``Σ_{t: token_it = v} b_it``;
- any other module with parameters of its own (norms, GPT-2's transposed linear, …): the
  vector-Jacobian products of that module alone, of all examples by `torch.func.vmap`, or one after
  the other where it refuses the module.

The sum over the examples is checked against autograd's total gradient. Parameters where the two
differ, or whose layer's input and output do not hold one row an example (a layer works on flattened
tokens, mixes examples, or a parameter is used outside its own module), are computed by a loop over
the examples instead, and remembered. An input without a dimension for tokens does not count as one
row an example: an expert that is given m tokens looks like that, and its sum is right. Mixing in a
layer without parameters of its own leaves the sum as it is and is not noticed: the rows are then
each example's share of the total gradient.

Cost: one forward and one backward pass of the batch, and ``m`` numbers for each parameter.

Under ``fully_shard`` a module holds whole weights while it runs, forward and backward, and the
hooks run then too; of each gradient a rank keeps its own part. All ranks run the same examples.

`safeopt.factored_gradients` keeps a and b instead of the m matrices of linear layers.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from safeopt.distributed import ALONE, Layout, Part, Range, local, sharded_gradients
from safeopt.isolation import attributes_kept
from safeopt.rows import rounds_products
from safeopt.rows import row_dtype as row_dtype

logger = logging.getLogger("safeopt")

# A wrong gradient is off by a factor; rounding stays far below this share of the gradient's norm.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}


class PerExampleGradients(NamedTuple):
    """Losses and gradients of m examples.

    Attributes:
        losses: shape ``(m,)``, detached.
        rows: one tensor for each parameter, shape ``(m, *p.shape)``, in float32 (float64 for
            float64 parameters); zeros where the losses do not depend on the parameter. This
            process's part where parameters are sharded.
    """

    losses: Tensor
    rows: list[Tensor]


def per_example_gradients(
    losses: Callable[[], Tensor],
    single_losses: Sequence[Callable[[], Tensor]],
    model: nn.Module,
    params: Sequence[Tensor],
    looped: set[int],
    layout: Layout = ALONE,
    *,
    verify: bool = True,
) -> PerExampleGradients:
    """Compute the gradient of each example's loss with respect to ``params``.

    Args:
        losses: runs the model on the whole batch and returns the losses, shape ``(m,)``.
        single_losses: m functions, each running the model on one example; shape ``(1,)``. They are
            called only for parameters that the hooks cannot serve.
        model: the module that holds ``params``.
        params: parameters that require a gradient.
        looped: indices into ``params`` known to need the loop over examples; extended in place.
        layout: how the parameters lie over the processes.
        verify: whether the sum over the examples is checked. For sharded parameters that takes the
            weights' gradients and their reduction, so do it once; for others it is cheap. Those of
            modules that are not called are checked in any case, see `Recorder.uncalled`.

    Returns:
        Losses and gradients, see `PerExampleGradients`.
    """
    total: Sequence[Tensor | None] = ()
    with Recorder(model, params, len(single_losses), looped, layout) as recorder:
        values = losses()
        checked = list(range(len(params)) if verify else sorted(recorder.uncalled))
        if checked and layout.sharded:
            checked = list(range(len(params)))  # `backward` computes them all
            total = sharded_gradients(values.sum(), params)
        elif recorder.edges or checked:
            wanted: list[Any] = [*recorder.edges, *(params[index] for index in checked)]
            found = torch.autograd.grad(values.sum(), wanted, allow_unused=True)
            total = found[len(recorder.edges) :]
    rows = [recorder.row(index) for index in range(len(params))]
    recorder.check(
        dict(zip(checked, total, strict=True)),
        lambda index: rows[index].sum(0),
        lambda index: torch.linalg.vector_norm(rows[index]),
        looped,
    )
    for index, row in looped_rows(single_losses, params, looped, layout).items():
        rows[index] = row
    return PerExampleGradients(values.detach(), rows)


def looped_rows(
    single_losses: Sequence[Callable[[], Tensor]],
    params: Sequence[Tensor],
    looped: set[int],
    layout: Layout = ALONE,
) -> dict[int, Tensor]:
    """Gradients of a few parameters by one pass for each example."""
    chosen = [params[i] for i in sorted(looped)]
    rows = [_empty_row(p, len(single_losses)) for p in chosen]
    if not rows:
        return {}
    for example, single in enumerate(single_losses):
        loss = single().sum()
        if layout.sharded:
            gradients: Sequence[Tensor | None] = sharded_gradients(loss, chosen)
        else:
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
        for row, gradient in zip(rows, gradients, strict=True):
            if gradient is not None:
                row[example] = local(gradient)
    return dict(zip(sorted(looped), rows, strict=True))


def _empty_row(p: Tensor, examples: int) -> Tensor:
    part = local(p).detach()
    return torch.zeros((examples, *part.shape), dtype=row_dtype(part), device=part.device)


class _Call(NamedTuple):
    """A module's call that is to be replayed, with its own weights, detached."""

    module: nn.Module
    weights: dict[str, Tensor]
    own: dict[str, int]
    args: Any
    kwargs: Any

    def output(self, chosen: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        """The output with other weights; where else these are used, they stay as they are."""
        weights = {**self.weights, **chosen}
        output: Tensor = functional_call(self.module, weights, args, kwargs, tie_weights=False)
        return output


class Recorder(AbstractContextManager["Recorder"]):
    """Hooks that add each module's share of the per-example gradients to ``rows``."""

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        examples: int,
        skip: set[int],
        layout: Layout = ALONE,
    ) -> None:
        self.examples = examples
        self.edges: list[GradientEdge] = []  # of all recorded outputs
        self.mixed: set[int] = set()
        # A layer ran in half precision, by itself or under autocast, or its products are rounded.
        self.rounded = False
        self._params = params
        self._layout = layout
        self._parts: Sequence[Part | Range | None] = layout.parts or [None] * len(params)
        self._rows: dict[int, Tensor] = {}
        wanted = {id(p): index for index, p in enumerate(params) if index not in skip}
        self._owned: dict[nn.Module, dict[str, int]] = {}
        for module in model.modules():
            own = {name: wanted[id(p)] for name, p in _own_parameters(module) if id(p) in wanted}
            if own:
                self._owned[module] = own
        self._silent = set(self._owned)  # modules that have not been called
        self._autocast: dict[nn.Module, tuple[bool, torch.dtype]] = {}  # in which they have run
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaying = False

    def __enter__(self) -> Recorder:
        for module in self._owned:
            self._handles.append(module.register_forward_hook(self._forward, with_kwargs=True))
        self._own_hooks = {handle.id for handle in self._handles}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A hook holds the recorder, which holds edges of the graph, which holds the hook: a ring
        # through autograd that Python's garbage collector cannot see.
        for handle in self._handles:
            handle.remove()
        self.edges.clear()

    @property
    def uncalled(self) -> set[int]:
        """Parameters of modules that were not called: without use, or used by other modules.

        One check does not tell which. Where the gradient is zero at first, as that of one of two
        factors is at an adapter's start, rows of zeros pass it and are wrong later.
        """
        return {index for module in self._silent for index in self._owned[module].values()}

    def row(self, index: int) -> Tensor:
        """The dense rows of a parameter, zeros at first."""
        if index not in self._rows:
            self._rows[index] = _empty_row(self._params[index], self.examples)
        return self._rows[index]

    def check(
        self,
        totals: Mapping[int, Tensor | None],
        summed: Callable[[int], Tensor],
        magnitude: Callable[[int], Tensor],
        looped: set[int],
    ) -> None:
        """Put parameters into ``looped`` that are mixed, or whose rows' sum is not the gradient.

        All numbers are read together: one wait for a GPU, one all-reduce where they are sharded.

        Args:
            totals: autograd's gradients of the losses' sum by the parameters' indices.
            summed: from an index to the sum of the parameter's rows, this process's part.
            magnitude: from an index to the norm of all its rows, likewise.
            looped: extended in place.
        """
        looped |= self.mixed
        dtypes, lengths = {}, []
        for index, gradient in totals.items():
            if gradient is not None and index not in looped:
                rows = summed(index)
                gap = torch.linalg.vector_norm(rows - local(gradient).to(rows.dtype))
                dtypes[index] = rows.dtype, gradient.dtype
                lengths.append(torch.stack([gap, magnitude(index).to(gap)]).double())
        if not lengths:
            return
        squares = torch.stack([pair.to(lengths[0].device) for pair in lengths]).square()
        if self._layout.sharded:  # elsewhere each process looks at examples of its own
            squares = self._layout.sum(squares)
        for index, (gap, norm) in zip(dtypes, squares.sqrt().tolist(), strict=True):
            ours, theirs = dtypes[index]
            tolerance = _AGREEMENT[ours] if ours == theirs and not self.rounded else 0.1
            # Padding can make a batch's gradient NaN where those of the examples are finite.
            if math.isfinite(norm) and not gap <= tolerance * norm + torch.finfo(theirs).tiny:
                looped.add(index)
                logger.info("parameter %d: its gradients need a loop over the examples", index)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._replaying or not torch.is_grad_enabled():
            return
        self._silent.discard(module)
        if not isinstance(output, Tensor):
            self.mixed.update(self._owned[module].values())
        elif output.requires_grad:
            self._autocast[module] = _autocast_state(output.device.type)
            self._watch(output, module, args, kwargs)

    def _watch(self, output: Tensor, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.edges.append(get_gradient_edge(output))
        hook = output.register_hook(lambda b: self._record(module, args, kwargs, b))
        self._handles.append(hook)

    @torch.no_grad()
    def _record(self, module: nn.Module, args: Any, kwargs: Any, b: Tensor) -> None:
        own = self._owned[module]
        self.rounded |= b.dtype.itemsize < 4 or (
            b.dtype == torch.float32 and rounds_products(b.device)
        )
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not self._one_row_each(first, b):
            self.mixed.update(own.values())
        elif type(module).forward is nn.Linear.forward:
            self._linear(own, first, b)
        elif _plain_embedding(module):
            self._embedding(module, own["weight"], first, b)
        else:
            self._local_products(module, own, args, kwargs, b)

    def _one_row_each(self, first: Tensor, b: Tensor) -> bool:
        """Whether input and output have a row for each example, and not for each token."""
        dimensions = 3 if first.is_floating_point() else 2  # token ids have no features
        flattened = self.examples > 1 and first.dim() < dimensions
        return first.shape[0] == b.shape[0] == self.examples and not flattened

    def _linear(self, own: dict[str, int], a: Tensor, b: Tensor) -> None:
        b = b.reshape(self.examples, -1, b.shape[-1])
        if "weight" in own:
            rows = self.row(own["weight"])
            a = a.reshape(self.examples, -1, a.shape[-1])
            part = self._parts[own["weight"]]
            inputs = part.cut(a, 1) if isinstance(part, Part) and part.dim == 1 else a
            outputs = part.cut(b, 2) if isinstance(part, Part) and part.dim == 0 else b
            # A layer may fetch its input from another device, behind the hooks.
            inputs = inputs.to(rows.device, rows.dtype)
            if isinstance(part, Range):
                some, inside = part.lines()
                products = outputs[..., some].transpose(1, 2).to(rows.dtype) @ inputs
                rows.add_(products.flatten(1)[:, inside])
            else:
                rows.baddbmm_(outputs.transpose(1, 2).to(rows.dtype), inputs)
        if "bias" in own:
            self.row(own["bias"]).add_(self._own(own["bias"], b.sum(1), leading=1))

    def _own(self, index: int, whole: Tensor, leading: int = 0) -> Tensor:
        """This process's part of a gradient."""
        part = self._parts[index]
        return whole if part is None else part.cut(whole, leading)

    def _embedding(self, module: Any, index: int, tokens: Tensor, b: Tensor) -> None:
        rows = self.row(index)
        flat_b = b.reshape(self.examples, -1, b.shape[-1]).to(rows.dtype)
        tokens = tokens.reshape(self.examples, -1).to(b.device)
        if module.padding_idx is not None:
            flat_b = flat_b * (tokens != module.padding_idx).unsqueeze(-1)
        part = self._parts[index]
        if part is None:
            starts = torch.arange(self.examples, device=tokens.device) * rows.shape[1]
            places = (tokens + starts.unsqueeze(1)).flatten()
            rows.flatten(0, 1).index_add_(0, places, flat_b.flatten(0, 1))
            return
        for example in range(self.examples):  # the whole table is large: one at a time
            whole = rows.new_zeros(module.weight.shape)
            whole.index_add_(0, tokens[example], flat_b[example])
            rows[example] += part.cut(whole)

    def _local_products(
        self, module: nn.Module, own: dict[str, int], args: Any, kwargs: Any, b: Tensor
    ) -> None:
        weights = {name: p.detach() for name, p in _own_parameters(module)}
        call = _Call(module, weights, own, args, kwargs)
        together = not (self._layout.sharded or self._is_hooked(module))
        self._replaying = True  # the replay runs this module's hooks again
        try:
            # A module may keep what it sees, and the backward pass does not run under the autocast
            # that a library has put around the model's forward alone.
            with attributes_kept(module), _autocast(b.device.type, *self._autocast[module]):
                if not (together and self._at_once(call, b)):
                    self._one_by_one(call, b)
        finally:
            self._replaying = False

    def _is_hooked(self, module: nn.Module) -> bool:
        """Whether others' hooks see the replay: they may keep tensors, of which vmap's are void."""
        return bool(_global_forward_hooks or _global_forward_pre_hooks) or any(
            not set(hooks) <= self._own_hooks
            for part in module.modules()
            for hooks in (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._backward_hooks,
                part._backward_pre_hooks,
            )
        )

    def _at_once(self, call: _Call, b: Tensor) -> bool:
        """The products of all examples by `torch.func.vmap`; False for a module that it refuses."""
        leaves, structure = tree_flatten((call.args, call.kwargs))
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        places = [place for place, x in enumerate(leaves) if self._has_rows(x)]

        def products(part: Tensor, *rows: Tensor) -> dict[str, Tensor]:
            one = list(leaves)
            for place, row in zip(places, rows, strict=True):
                one[place] = row.unsqueeze(0)
            inputs, named = tree_unflatten(one, structure)

            def output(chosen: dict[str, Tensor]) -> Tensor:
                return call.output(chosen, inputs, named)

            pull: Any = vjp(output, {name: call.weights[name] for name in call.own})[1]
            return dict(pull(part.unsqueeze(0))[0])

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                found = vmap(products)(b, *(leaves[place] for place in places))
        except Exception as error:  # a backward pass of its own, a branch that depends on the data
            logger.debug("%s: one example at a time (%s)", type(call.module).__name__, error)
            return False
        for name, gradients in found.items():
            index = call.own[name]
            self.row(index).add_(self._own(index, gradients, leading=1))
        return True

    def _one_by_one(self, call: _Call, b: Tensor) -> None:
        for example in range(self.examples):
            leaves = {name: call.weights[name].clone().requires_grad_() for name in call.own}
            inputs, named = tree_map(partial(self._one, example=example), (call.args, call.kwargs))
            try:
                with torch.enable_grad():
                    output = call.output(leaves, inputs, named)
            except Exception as error:  # it remembers the whole batch: a recurrent layer's state
                logger.debug("%s cannot be replayed (%s)", type(call.module).__name__, error)
                self.mixed.update(call.own.values())
                return
            part = b[example : example + 1]
            if output.shape != part.shape:  # an argument could not be cut down to one example
                self.mixed.update(call.own.values())
                return
            if not output.requires_grad:  # the module does not use the parameters it owns
                continue
            gradients = torch.autograd.grad(output, list(leaves.values()), part, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    index = call.own[name]
                    self.row(index)[example] += self._own(index, gradient)

    def _has_rows(self, value: Any) -> bool:
        """Whether a module's argument has a row for each example."""
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.examples

    def _one(self, value: Any, example: int) -> Any:
        return value[example : example + 1].detach() if self._has_rows(value) else value


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters by name, without those of modules inside; one may have two names."""
    return module.named_parameters(recurse=False, remove_duplicate=False)


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a type of device, and its dtype."""
    if not torch.amp.is_autocast_available(device):
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast as it was when `_autocast_state` was read."""
    if _autocast_state(device) == (enabled, dtype):
        return nullcontext()
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def _plain_embedding(module: Any) -> bool:
    """Whether a module is an embedding, perhaps under `fully_shard`, that is a mere look-up."""
    looks_up = type(module).forward is nn.Embedding.forward
    return looks_up and not (module.max_norm or module.scale_grad_by_freq)
