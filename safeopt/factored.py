"""Per-example gradients kept as what they are made of, never as matrices.

The gradient of a linear layer's weight for example i is a sum over its tokens,

    g_i = Σ_t b_t a_tᵀ,        a_t the layer's input (d_in), b_t the gradient of its output (d_out)

so a and b say everything: T(d_in + d_out) numbers for all examples instead of m·d_in·d_out. Layers
with the same input (q, k, v; gate, up) share a. Tokens whose b is zero, padding among them, are
left out, and inputs that agree to rounding (the same tokens after the same beginning, as after a
system prompt) are kept once. The gradient of an embedding is the same sum with a one-hot vector,
the token's id, in the place of b_t, and the gradient of the token's vector in that of a_t. A weight
that is used twice (a tied embedding) has a sum of two such sums. What is no matrix product (norms,
biases) stays dense.

Inner products of two examples have two forms, and the cheaper one is taken for each weight:

    ⟨g_i, g_j⟩ = Σ_ts (a_it·a_js)(b_it·b_js)                T²(d_in + d_out) operations
               = ⟨Σ_t b_it a_itᵀ, Σ_s b_js a_jsᵀ⟩           (T + m²)·d_in·d_out operations

The second one forms the matrices for a few rows of the weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safeopt.factors import Factors, joined, without
from safeopt.rows import as_matrix, exact_products, flat_products, inner_products, mixed, row_dtype

# Numbers in a temporary tensor, at most: 64 MiB in float32.
_TEMPORARY = 1 << 24


class FactoredRows:
    """Gradients of m examples over all protected parameters, in factored form.

    Args:
        shapes: of the parameters.
        dtypes: in which their parts are computed, see `safeopt.rows.row_dtype`.
        sites: the factors; a weight may have several.
        dense: for other parameters, by their indices, rows ``(m, *p.shape)``. A parameter that has
            neither these nor factors has no gradient.
        scale: a factor for each example, shape ``(m,)``, float64.
        devices: of the parameters; all on that of ``scale`` by default.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype],
        sites: Sequence[Factors],
        dense: Mapping[int, Tensor],
        scale: Tensor,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.shapes = list(shapes)
        self.dtypes = list(dtypes)
        self.sites = list(sites)
        self.dense = dict(dense)
        self._sites_of: dict[int, list[Factors]] = {}
        for site in self.sites:
            for index in site.left:
                self._sites_of.setdefault(index, []).append(site)
        self.scale = scale
        self.device = scale.device
        self.devices = [self.device] * len(self.shapes) if devices is None else list(devices)

    def __len__(self) -> int:
        """Number of rows m."""
        return len(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors and dense rows."""
        tensors = [t for site in self.sites for t in site.tensors] + list(self.dense.values())
        return sum(tensor.nbytes for tensor in tensors)

    def is_dense(self, index: int) -> bool:
        """Whether a parameter's rows are kept as they are."""
        return index in self.dense

    def select(self, examples: Sequence[int]) -> FactoredRows:
        """Some of the rows, in the order of ``examples``."""
        chosen = list(examples)
        return self._with(
            [site.select(chosen) for site in self.sites],
            {i: rows[chosen] for i, rows in self.dense.items()},
            self.scale[chosen],
        )

    def scaled(self, factors: Tensor) -> FactoredRows:
        """The rows times ``factors (m,)``; nothing is copied."""
        scale = self.scale * factors.to(self.scale)
        return self._with(self.sites, self.dense, scale)

    def stored_as(self, dtype: torch.dtype) -> FactoredRows:
        """The rows with their factors rounded to ``dtype``, to save memory."""
        sites = [
            Factors(
                site.right.to(dtype),
                {i: x.to(dtype) if x.is_floating_point() else x for i, x in site.left.items()},
                site.counts,
                site.places,
            )
            for site in self.sites
        ]
        return self._with(sites, self.dense, self.scale)

    def noise(self, generator: torch.Generator) -> FactoredRows:
        """Rows made of standard normal factors of the same shapes."""

        def drawn(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return torch.randn(x.shape, generator=generator, device="cpu").to(x)

        sites = [
            Factors(
                drawn(site.right),
                {i: drawn(x) for i, x in site.left.items()},
                site.counts,
                site.places,
            )
            for site in self.sites
        ]
        dense = {i: drawn(rows) for i, rows in self.dense.items()}
        return self._with(sites, dense, torch.ones_like(self.scale))

    def with_dense(self, rows: Mapping[int, Tensor]) -> FactoredRows:
        """The same gradients but for some parameters, whose rows ``(m, *p.shape)`` are given."""
        dense = {**self.dense, **rows}
        sites = [without(site, dense) for site in self.sites]
        return self._with([s for s in sites if s.left], dense, self.scale)

    def summed(self, index: int) -> Tensor:
        """The sum of a parameter's rows, of its shape."""
        device = self.devices[index]
        total = torch.zeros(self.shapes[index], dtype=self.dtypes[index], device=device)
        self.add_into(index, total, torch.ones(len(self), device=self.device))
        return total

    def magnitude(self, index: int) -> Tensor:
        """The length of a parameter's rows, as if nothing cancelled within an example."""
        if index in self.dense:
            return torch.linalg.vector_norm(self.dense[index])
        total = torch.zeros((), dtype=self.dtypes[index], device=self.devices[index])
        for site in self._sites_of.get(index, []):
            left, lengths = site.left[index], site.right.norm(dim=1)[site.places]
            if left.dim() == 2:
                lengths = lengths * left.norm(dim=1)
            total = torch.hypot(total, torch.linalg.vector_norm(lengths).to(total))
        return total

    def followed_by(self, other: FactoredRows) -> FactoredRows:
        """All rows of this object and then all of ``other``'s."""
        sites = [joined(pair, (len(self), len(other))) for pair in _aligned(self, other)]
        scale = torch.cat([self.scale, other.scale])
        rows = self._with(sites, {}, scale)
        both = sorted({*self.dense, *other.dense})
        return rows.with_dense({i: torch.cat([self.unscaled(i), other.unscaled(i)]) for i in both})

    def products(self) -> Tensor:
        """The Gram matrix, shape ``(m, m)``, float64."""
        return self.inner(self)

    def inner(self, other: FactoredRows) -> Tensor:
        """Inner products with other rows, shape ``(m, len(other))``, float64."""
        total = torch.zeros(len(self), len(other), dtype=torch.float64, device=self.device)
        known: dict[tuple[int, int], Tensor] = {}
        for index in range(len(self.shapes)):
            total += self._inner_of(other, index, known).to(total.device)
        return self.scale.unsqueeze(1) * total * other.scale

    def products_of(self, index: int) -> Tensor:
        """What parameter ``index`` adds to the Gram matrix, shape ``(m, m)``, float64."""
        part = self._inner_of(self, index, {}).to(self.device)
        return self.scale.unsqueeze(1) * part * self.scale

    def _inner_of(
        self, other: FactoredRows, index: int, known: dict[tuple[int, int], Tensor]
    ) -> Tensor:
        """One parameter's part of the inner products, without the rows' scales."""
        if index in self.dense or index in other.dense:
            return inner_products([self.unscaled(index)], [other.unscaled(index)])
        if self._by_tokens(other, index):
            return self._token_products(other, index, known)
        return self._matrix_products(other, index)

    def block(self, index: int) -> Tensor:
        """The part of parameter ``index`` as a dense tensor, shape ``(m, *p.shape)``."""
        rows = self.unscaled(index)
        return rows * self.scale.to(rows).view(-1, *[1] * len(self.shapes[index]))

    def unscaled(self, index: int) -> Tensor:
        """The same without the rows' scale."""
        if index in self.dense:
            return self.dense[index]
        if index not in self._sites_of:
            shape = (len(self), *self.shapes[index])
            return torch.zeros(shape, dtype=self.dtypes[index], device=self.devices[index])
        return self._matrices(index, 0, self.shapes[index][0])

    def _matrices(self, index: int, low: int, high: int) -> Tensor:
        """Rows ``low`` to ``high`` of each example's gradient of a weight with factors."""
        dtype, width = self.dtypes[index], self.shapes[index][1]
        out = torch.zeros(len(self), high - low, width, dtype=dtype, device=self.devices[index])
        for site in self._sites_of.get(index, []):
            lefts = site.left[index].split(list(site.counts))
            rights = site.right[site.places].split(list(site.counts))
            for row, left, right in zip(out, lefts, rights, strict=True):
                if left.dim() == 1:
                    inside = (left >= low) & (left < high)
                    row.index_add_(0, left[inside] - low, right[inside].to(dtype))
                else:
                    with exact_products(row.device):
                        row.addmm_(left[:, low:high].to(dtype).T, right.to(dtype))
        return out

    def along(self, index: int, direction: Tensor) -> Tensor:
        """Inner products of every example's gradient of one parameter with a direction.

        Args:
            index: of the parameter.
            direction: of the parameter's shape.

        Returns:
            Shape ``(m,)``, float64. Cost: a forward pass of the kept tokens through that layer.
        """
        dtype = self.dtypes[index]
        direction = direction.detach().to(dtype)
        if index in self.dense:
            row = direction.reshape(1, -1)
            products = flat_products(as_matrix(self.dense[index]), row).squeeze(1)
            return self.scale * products.to(self.device)
        total = torch.zeros(len(self), dtype=torch.float64, device=self.devices[index])
        for site in self._sites_of.get(index, []):
            right, step = site.right.to(dtype), max(1, _TEMPORARY // sum(self.shapes[index]))
            with exact_products(right.device):
                moved = right @ direction.T if site.left[index].dim() == 2 else None
            for low in range(0, len(site.places), step):
                part = slice(low, low + step)
                left, places = site.left[index][part], site.places[part]
                pair = (
                    (direction[left], right[places])
                    if moved is None
                    else (left.to(dtype), moved[places])
                )
                total.index_add_(0, site.owners[part], (pair[0] * pair[1]).sum(1).double())
        return self.scale * total.to(self.device)

    def add_into(self, index: int, tensor: Tensor, weights: Tensor) -> None:
        """Add Σ_i weights_i g_i's part of one parameter to ``tensor``, in place.

        Args:
            index: of the parameter.
            tensor: of its shape, in any dtype.
            weights: shape ``(m,)``.

        Cost: a forward pass of the kept tokens through that layer.
        """
        weights = (weights.to(self.scale) * self.scale).to(self.devices[index])
        dtype = self.dtypes[index]
        if index in self.dense:
            rows = self.dense[index]
            step = mixed(weights.unsqueeze(0), rows)
            tensor.add_(step.view(tensor.shape).to(tensor.dtype))
            return
        exact = tensor if tensor.dtype == dtype else torch.zeros_like(tensor, dtype=dtype)
        for site in self._sites_of.get(index, []):
            right, left = site.right.to(dtype), site.left[index]
            weight = weights[site.owners].to(dtype).unsqueeze(1)
            if left.dim() == 1:
                exact.index_add_(0, left, right[site.places] * weight)
            else:
                summed = right.new_zeros(len(right), left.shape[1])
                summed.index_add_(0, site.places, left.to(dtype) * weight)
                with exact_products(right.device):
                    exact.addmm_(summed.T, right)
        if exact is not tensor:
            tensor.add_(exact.to(tensor.dtype))

    def factors(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A weight's factors: ``left (T, d_out)`` or ids ``(T,)``, ``right (T, d_in)``, owners."""
        for site in self._sites_of.get(index, []):
            yield site.left[index], site.right[site.places], site.owners

    def compact(self) -> FactoredRows:
        """The same rows with inputs that agree to rounding kept once."""
        sites = [site.compact() for site in self.sites]
        return self._with(sites, self.dense, self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the tensors are the object's own."""
        sites = [[s.right, dict(s.left), list(s.counts), s.places] for s in self.sites]
        return {"sites": sites, "dense": self.dense, "scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], params: Sequence[Tensor]) -> FactoredRows:
        """The rows of a `state_dict`, on the parameters' devices; tensors are not copied.

        Raises:
            ValueError: if they do not fit the parameters.
        """
        count, devices = len(state["scale"]), [p.device for p in params]
        sites = []
        for right, left, counts, places in state["sites"]:
            whole = len(counts) == count and all(isinstance(n, int) for n in counts)
            whole = whole and sum(counts) == len(places) and len(left) > 0
            if not whole or min(counts, default=0) < 0 or not _all_below(len(right), places):
                raise ValueError("the factors of a layer do not fit each other")
            for index, x in left.items():
                shape: tuple[int, ...] = params[index].shape if index < len(params) else ()
                expected = (len(places), *shape[: x.dim() - 1])
                fits = tuple(x.shape) == expected and tuple(shape[1:]) == tuple(right.shape[1:])
                if not fits or (x.dim() == 1 and not _all_below(shape[0], x)):
                    raise ValueError(f"the factors of parameter {index} do not fit the parameters")
            device = devices[next(iter(left))]
            moved = {i: x.to(device) for i, x in left.items()}
            sites.append(Factors(right.to(device), moved, counts, places.to(device)))
        for index, rows in state["dense"].items():
            if index >= len(params) or rows.shape != (count, *params[index].shape):
                raise ValueError(f"the rows of parameter {index} do not fit the parameters")
        dense = {i: rows.to(devices[i]) for i, rows in state["dense"].items()}
        shapes, dtypes = [p.shape for p in params], [row_dtype(p) for p in params]
        return cls(shapes, dtypes, sites, dense, state["scale"].to(devices[0]), devices)

    def _with(
        self, sites: Sequence[Factors], dense: Mapping[int, Tensor], scale: Tensor
    ) -> FactoredRows:
        """Other rows over the same parameters."""
        return FactoredRows(self.shapes, self.dtypes, sites, dense, scale, self.devices)

    def _by_tokens(self, other: FactoredRows, index: int) -> bool:
        """Whether inner products over tokens are cheaper than over the weight's entries."""
        shape = self.shapes[index]
        mine, theirs = (
            sum(len(site.places) for site in x._sites_of.get(index, [])) for x in (self, other)
        )
        entries = mine + (theirs if other is not self else 0) + len(self) * len(other)
        return mine * theirs * sum(shape) < entries * shape.numel()

    def _token_products(
        self, other: FactoredRows, index: int, known: dict[tuple[int, int], Tensor]
    ) -> Tensor:
        device, dtype = self.devices[index], self.dtypes[index]
        total = torch.zeros(len(self), len(other), dtype=torch.float64, device=device)
        for mine in self._sites_of.get(index, []):
            for theirs in other._sites_of.get(index, []):
                pair = (id(mine), id(theirs))
                if pair not in known:  # layers with the same input share it
                    known.clear()
                    with exact_products(device):
                        known[pair] = mine.right.to(dtype) @ theirs.right.to(dtype).T
                products = _left_products(mine.left[index], theirs.left[index], dtype)
                inputs = known[pair][mine.places][:, theirs.places]
                total += _by_example(products * inputs, mine.owners, theirs.owners, total)
        return total

    def _matrix_products(self, other: FactoredRows, index: int) -> Tensor:
        device = self.devices[index]
        total = torch.zeros(len(self), len(other), dtype=torch.float64, device=device)
        height, width = self.shapes[index]
        step = max(1, _TEMPORARY // ((len(self) + len(other)) * width))
        for low in range(0, height, step):
            high = min(low + step, height)
            mine = self._matrices(index, low, high)
            theirs = mine if other is self else other._matrices(index, low, high)
            total += flat_products(as_matrix(mine), as_matrix(theirs))
        return total


def _all_below(limit: int, numbers: Tensor) -> bool:
    """Whether all numbers are places among ``limit`` things."""
    return bool(((numbers >= 0) & (numbers < limit)).all())


def _left_products(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """l_t·l_s of two weights' left factors, ``(T, S)``; ids stand for one-hot vectors."""
    if mine.dim() == theirs.dim() == 1:
        return mine.unsqueeze(1) == theirs
    if mine.dim() == 1:
        return theirs[:, mine].T
    if theirs.dim() == 1:
        return mine[:, theirs]
    with exact_products(mine.device):
        return mine.to(dtype) @ theirs.to(dtype).T


def _by_example(products: Tensor, rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """Sums of ``products (T, S)`` over the tokens of each pair of examples, in float64."""
    by_row = like.new_zeros(like.shape[0], products.shape[1])
    by_row.index_add_(0, rows, products.to(torch.float64))
    return torch.zeros_like(like).index_add_(1, columns, by_row)


def _aligned(one: FactoredRows, two: FactoredRows) -> Iterator[list[Factors | None]]:
    """The sites of two passes side by side; a site that one of them lacks is None there."""
    numbered: list[dict[tuple[Any, ...], Factors]] = []
    for rows in (one, two):
        seen: dict[tuple[Any, ...], int] = {}
        named = {}
        for site in rows.sites:
            seen[site.key] = seen.get(site.key, 0) + 1
            named[(*site.key, seen[site.key])] = site
        numbered.append(named)
    for name in dict.fromkeys([*numbered[0], *numbered[1]]):
        yield [named.get(name) for named in numbered]
