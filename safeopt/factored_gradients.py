"""Per-example gradients in factored form, from one forward and one backward pass.

The hooks of `safeopt.per_example` keep a and b of linear layers and embeddings, as
`safeopt.factored.FactoredRows`, instead of the m matrices that they make. Autograd is asked for the
gradients of the layers' outputs alone: those of the weights, a third of the pass, are left out but
for the first time, when the sum over the examples is checked against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from safeopt.factored import FactoredRows
from safeopt.factors import Factors
from safeopt.per_example import Recorder, looped_rows
from safeopt.rows import row_dtype


def factored_gradients(
    losses: Callable[[], Tensor],
    single_losses: Sequence[Callable[[], Tensor]],
    model: nn.Module,
    params: Sequence[Tensor],
    looped: set[int],
    *,
    verify: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, FactoredRows]:
    """The same gradients as `per_example_gradients`, linear layers and embeddings factored.

    Args:
        losses: as for `per_example_gradients`.
        single_losses: likewise.
        model: likewise.
        params: likewise.
        looped: likewise; these parameters' rows are dense.
        verify: whether the sum over the examples is checked against autograd's total gradient.
            Needed once for a model and its parameters: it finds those to put into ``looped``. Those
            of modules that are not called are checked in any case, see `Recorder.uncalled`.
        dtype: in which factors are kept; None keeps the dtype in which the layers run.

    Returns:
        Losses, shape ``(m,)``, detached, and the gradients.

    Cost: one forward and one backward pass without the gradients of factored weights; with
    ``verify`` the whole backward pass, one number for each parameter, and the weight gradients once
    more.
    """
    recorder = _FactoredRecorder(model, params, len(single_losses), skip=looped)
    with recorder:
        values = losses()
        checked = range(len(params)) if verify else sorted(recorder.uncalled)
        wanted: list[Any] = [*recorder.edges, *(params[i] for i in checked)]
        found: list[Tensor | None] = []
        if wanted:  # not where all parameters are looped
            found = list(torch.autograd.grad(values.sum(), wanted, allow_unused=True))
        total = found[len(recorder.edges) :]
        recorder.read(found)
    rows = recorder.rows(None if checked else dtype)
    recorder.check(dict(zip(checked, total, strict=True)), rows.summed, rows.magnitude, looped)
    rows = rows.with_dense(looped_rows(single_losses, params, looped))
    return values.detach(), rows if dtype is None else rows.stored_as(dtype)


def in_order(
    parts: Sequence[tuple[Sequence[int], Tensor, FactoredRows]],
) -> tuple[Tensor, FactoredRows]:
    """Losses and gradients of several passes, put together by the examples' positions.

    Args:
        parts: for each pass the positions of its examples in the result, and what
            `factored_gradients` returned.
    """
    positions = [position for part in parts for position in part[0]]
    order = sorted(range(len(positions)), key=positions.__getitem__)
    rows = parts[0][2]
    for _, _, more in parts[1:]:
        rows = rows.followed_by(more)
    return torch.cat([losses for _, losses, _ in parts])[order], rows.select(order)


class _FactoredRecorder(Recorder):
    """Keeps the inputs and output gradients of linear layers and embeddings as they are.

    The output gradients are asked of autograd by their edges in the graph, so that it computes
    these alone; a module is read when its output gradient is there, and the gradient then dropped.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], examples: int, skip: set[int]
    ) -> None:
        super().__init__(model, params, examples, skip)
        self._calls: list[tuple[nn.Module, Any, Any]] = []
        # One entry for each input of linear layers: its tensor and the output gradients.
        self._linear_sites: dict[tuple[Any, ...], list[tuple[Tensor, dict[int, Tensor]]]] = {}
        self._embedding_sites: list[tuple[int, Tensor, Tensor]] = []

    def read(self, gradients: list[Tensor | None]) -> None:
        """Record all modules; ``gradients`` belong to the edges, and are emptied."""
        for position, (module, args, kwargs) in enumerate(self._calls):
            b, gradients[position] = gradients[position], None
            if b is not None:
                self._record(module, args, kwargs, b)
        self._calls.clear()

    def rows(self, dtype: torch.dtype | None) -> FactoredRows:
        """All rows, without padding and other tokens whose gradients are zero."""
        sites = []
        while self._linear_sites:
            _, uses = self._linear_sites.popitem()
            sites += [_kept(a, left, list(left.values()), dtype) for a, left in uses]
        while self._embedding_sites:
            index, tokens, b = self._embedding_sites.pop()
            sites.append(_kept(b, {index: tokens}, [b], dtype))
        rows = FactoredRows(
            [p.shape for p in self._params],
            [row_dtype(p) for p in self._params],
            sites,
            {},
            self._ones(),
            [p.device for p in self._params],
        )
        return rows.with_dense({i: row + rows.unscaled(i) for i, row in self._rows.items()})

    def _ones(self) -> Tensor:
        return torch.ones(self.examples, dtype=torch.float64, device=self._params[0].device)

    def _watch(self, output: Tensor, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.edges.append(get_gradient_edge(output))
        self._calls.append((module, args, kwargs))

    def _linear(self, own: dict[str, int], a: Tensor, b: Tensor) -> None:
        b = b.reshape(self.examples, -1, b.shape[-1])
        if "weight" in own:
            place = (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device, b.device)
            uses = self._linear_sites.setdefault(place, [])
            if not uses or own["weight"] in uses[-1][1]:
                inputs = a.detach().reshape(self.examples, -1, a.shape[-1])
                uses.append((inputs.to(b.device), {}))
            uses[-1][1][own["weight"]] = b
        if "bias" in own:
            self.row(own["bias"]).add_(b.sum(1))

    def _embedding(self, module: nn.Embedding, index: int, tokens: Tensor, b: Tensor) -> None:
        b = b.reshape(self.examples, -1, b.shape[-1])
        tokens = tokens.reshape(self.examples, -1).to(b.device)
        if module.padding_idx is not None:
            b = b * (tokens != module.padding_idx).unsqueeze(-1)
        self._embedding_sites.append((index, tokens, b))


def _kept(
    right: Tensor, left: dict[int, Tensor], gradients: Sequence[Tensor], dtype: torch.dtype | None
) -> Factors:
    """The tokens of ``(m, T, …)`` factors that have a gradient."""
    kept = torch.zeros(right.shape[:2], dtype=torch.bool, device=right.device)
    for gradient in gradients:
        kept |= (gradient != 0).any(-1)

    def chosen(x: Tensor) -> Tensor:
        if x.is_floating_point() and dtype is not None:
            x = x.to(dtype)
        return x[kept]

    left = {index: chosen(left.pop(index)) for index in list(left)}
    places = torch.arange(int(kept.sum()), device=right.device)
    return Factors(chosen(right), left, kept.sum(1).tolist(), places)
