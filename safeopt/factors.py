"""One place of a model in a factored gradient: Σ_t l_t r_tᵀ for the tokens of m examples.

See `safeopt.factored`, which puts such places together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from safeopt.rows import exact_products

# Inputs this close, relative to their length, are one: rounding in a forward pass is as large.
_SAME = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-9, torch.float16: 1e-9}


@dataclass(frozen=True)
class Factors:
    """Σ_t l_t r_tᵀ for the tokens of m examples, for all weights that share r.

    Attributes:
        right: r, shape ``(S, d_in)``: a layer's inputs, or the gradients of token vectors.
        left: for each weight, by its index, l: the gradient of the layer's output, shape
            ``(T, d_out)``, or token ids, shape ``(T,)``, int64, which stand for one-hot vectors.
        counts: number of tokens of each example; their tokens follow each other.
        places: the row of ``right`` that belongs to each token, shape ``(T,)``, int64.
    """

    right: Tensor
    left: Mapping[int, Tensor]
    counts: Sequence[int]
    places: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [self.right, self.places, *self.left.values()]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the same place of the model has in common in two passes."""
        return tuple((index, left.dim()) for index, left in self.left.items())

    @cached_property
    def owners(self) -> Tensor:
        """The example of each token, shape ``(T,)``, int64; kept, as every step asks for it."""
        counts = torch.tensor(self.counts, device=self.right.device)
        # Without its length a GPU would be waited for.
        return torch.repeat_interleave(counts, output_size=len(self.places))

    def select(self, examples: Sequence[int]) -> Factors:
        """The tokens of some examples, in their order."""
        if list(examples) == list(range(len(self.counts))):
            return self
        counts = list(self.counts)
        places = self.places.split(counts)
        parts = {i: left.split(counts) for i, left in self.left.items()}
        used, chosen = torch.unique(torch.cat([places[e] for e in examples]), return_inverse=True)
        return Factors(
            self.right[used],
            {i: torch.cat([part[e] for e in examples]) for i, part in parts.items()},
            [counts[e] for e in examples],
            chosen,
        )

    def compact(self) -> Factors:
        """The same with rows of ``right`` that agree to rounding kept once."""
        if len(self.right) < 2:
            return self
        x = self.right.to(torch.float64 if self.right.dtype == torch.float64 else torch.float32)
        generator = torch.Generator().manual_seed(0)
        # Rows that agree have neighbouring projections on any one vector, but for coarse rounding.
        vector = torch.randn(x.shape[1], generator=generator, device="cpu").to(x)
        with exact_products(x.device):
            order = (x @ vector).argsort()
        ordered = x[order]
        gaps = (ordered[1:] - ordered[:-1]).norm(dim=1)
        new = gaps > _SAME[self.right.dtype] * ordered[1:].norm(dim=1)
        groups = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        groups[order[1:]] = new.cumsum(0)
        first = order[torch.cat([new.new_ones(1), new])]
        if len(first) == len(x):
            return self
        return replace(self, right=self.right[first], places=groups[self.places])


def joined(pair: Sequence[Factors | None], lengths: Sequence[int]) -> Factors:
    """One place in two passes, put together; None where a pass lacks it.

    Args:
        pair: the place in each pass.
        lengths: number of examples of each pass.
    """
    present = [site for site in pair if site is not None]
    counts: list[int] = []
    for site, length in zip(pair, lengths, strict=True):
        counts += [0] * length if site is None else list(site.counts)
    left = {i: torch.cat([site.left[i] for site in present]) for i in present[0].left}
    starts = [0, *(len(site.right) for site in present)]
    places = [site.places + start for site, start in zip(present, starts, strict=False)]
    return Factors(torch.cat([site.right for site in present]), left, counts, torch.cat(places))


def without(site: Factors, indices: Mapping[int, Any]) -> Factors:
    """The same place without some weights."""
    return replace(site, left={i: left for i, left in site.left.items() if i not in indices})
