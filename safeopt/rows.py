"""Gradients of m examples as rows, and their inner products.

Everything that is estimated from per-example gradients needs only what `GradientRows` names: how
the rows multiply, and one parameter's part of them at a time. `DenseRows` keeps them as they are;
`safeopt.factored.FactoredRows` keeps what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from safeopt.distributed import ALONE, Layout, local

# Columns multiplied in the rows' own dtype; the products of these tiles are summed in float64.
COLUMNS = 1 << 14
# Numbers that are copied to multiply small blocks together: a processor soon loses by it what it
# saves in calls, a GPU waits for the launches of many small products.
_TOGETHER = {"cpu": 1 << 18}
_TOGETHER_ELSEWHERE = 1 << 24


class GradientRows(Protocol):
    """Gradients g_1, …, g_m over all protected parameters."""

    def __len__(self) -> int:
        """Number of rows m."""

    @property
    def dtypes(self) -> list[torch.dtype]:
        """For each parameter the dtype of its part: float32 or float64."""

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""

    def products(self) -> Tensor:
        """The Gram matrix ⟨g_i, g_j⟩, shape ``(m, m)``, float64."""

    def products_of(self, index: int) -> Tensor:
        """What parameter ``index`` adds to the Gram matrix, shape ``(m, m)``, float64."""

    def along(self, index: int, direction: Tensor) -> Tensor:
        """Inner products of parameter ``index``'s part with a direction, ``(m,)``, float64."""

    def block(self, index: int) -> Tensor:
        """The part of parameter ``index``, shape ``(m, *p.shape)``."""

    def noise(self, generator: torch.Generator) -> GradientRows:
        """Random rows of the same storage; not of the same lengths."""

    def scaled(self, factors: Tensor) -> GradientRows:
        """The rows times ``factors (m,)``."""


class DenseRows:
    """Rows as they are.

    Args:
        blocks: one tensor for each parameter, shape ``(m, *p.shape)``, float32 or float64.
        layout: how the parameters lie over the processes; the blocks are this process's parts.
    """

    def __init__(self, blocks: Sequence[Tensor], layout: Layout = ALONE) -> None:
        self.blocks = list(blocks)
        self.layout = layout

    def __len__(self) -> int:
        """Number of rows m."""
        return len(self.blocks[0])

    @property
    def dtypes(self) -> list[torch.dtype]:
        """For each parameter the dtype of its part."""
        return [block.dtype for block in self.blocks]

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""
        return [block.shape[1:] for block in self.blocks]

    def products(self) -> Tensor:
        """The Gram matrix, shape ``(m, m)``, float64: m²·n operations."""
        return self.layout.sum(inner_products(self.blocks, self.blocks))

    def products_of(self, index: int) -> Tensor:
        """What parameter ``index`` adds to the Gram matrix, shape ``(m, m)``, float64."""
        block = [self.blocks[index]]
        return self.layout.sum(inner_products(block, block))

    def along(self, index: int, direction: Tensor) -> Tensor:
        """Inner products of parameter ``index``'s part with a direction, ``(m,)``, float64."""
        row = local(direction.detach()).unsqueeze(0).to(self.blocks[index])
        return self.layout.sum(inner_products([self.blocks[index]], [row]).squeeze(1))

    def block(self, index: int) -> Tensor:
        """The part of parameter ``index``, shape ``(m, *p.shape)``."""
        return self.blocks[index]

    def noise(self, generator: torch.Generator) -> DenseRows:
        """Standard normal rows; the same ones however they lie over the processes."""
        parts = self.layout.parts or [None] * len(self.blocks)
        blocks = []
        for b, part in zip(self.blocks, parts, strict=True):
            shape = b.shape if part is None else part.whole(b.shape, leading=1)
            drawn = torch.randn(shape, generator=generator, device="cpu")
            blocks.append((drawn if part is None else part.cut(drawn, leading=1)).to(b))
        return DenseRows(blocks, self.layout)

    def followed_by(self, more: DenseRows) -> DenseRows:
        """These rows and those of other examples after them."""
        blocks = [torch.cat(pair) for pair in zip(self.blocks, more.blocks, strict=True)]
        return DenseRows(blocks, self.layout)

    def scaled(self, factors: Tensor) -> DenseRows:
        """The rows times ``factors (m,)``."""
        blocks = [b * factors.to(b).view(-1, *[1] * (b.dim() - 1)) for b in self.blocks]
        return DenseRows(blocks, self.layout)


def as_matrix(rows: Tensor) -> Tensor:
    """Rows of shape ``(m, *p.shape)`` as a matrix ``(m, n)``; a scalar parameter has one column."""
    return rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products of rows, summed over the parameters.

    Args:
        left: one tensor for each parameter, shape ``(m, *p.shape)``.
        right: likewise, shape ``(l, *p.shape)``.

    Returns:
        Shape ``(m, l)``, float64.
    """
    device = left[0].device
    total = torch.zeros(left[0].shape[0], right[0].shape[0], dtype=torch.float64, device=device)
    for group in _groups(left, right):
        a = _side_by_side([left[i] for i in group])
        b = a if left is right else _side_by_side([right[i] for i in group])
        total += flat_products(a, b).to(device)
    return total


def _groups(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[list[int]]:
    """Neighbours to be multiplied at once: hundreds of small products would be mostly overhead."""
    group: list[int] = []
    numbers, last = 0, None
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if not (a.numel() and b.numel()):  # no product; an empty basis may be of another dtype
            continue
        size, kind = a.numel() + b.numel(), (a.device, a.dtype, b.device, b.dtype)
        most = _TOGETHER.get(a.device.type, _TOGETHER_ELSEWHERE)
        if group and (kind != last or numbers + size > most):
            yield group
            group, numbers = [], 0
        group.append(index)
        numbers, last = numbers + size, kind
    if group:
        yield group


def _side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks ``(m, *p.shape)`` as one matrix; a single one is not copied."""
    matrices = [as_matrix(block) for block in blocks]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)


def flat_products(left: Tensor, right: Tensor) -> Tensor:
    """left·rightᵀ of ``(m, n)`` and ``(l, n)`` in float64.

    float32 alone loses three digits over ten million columns.
    """
    (a, left_over), (b, right_over) = _tiles(left), _tiles(right)
    with exact_products(left.device):
        total = (left_over @ right_over.T).to(torch.float64)
        return total + (a @ b.transpose(1, 2)).sum(0, dtype=torch.float64)


def flat_combination(weights: Tensor, rows: Tensor) -> Tensor:
    """weightsᵀ·rows of ``(m,)`` and ``(m, n)``: shape ``(n,)``.

    By tiles, which the threads share: 1.3 times as fast as one product on a CPU.
    """
    tiles, rest = _tiles(rows)
    step = rows.new_empty(rows.shape[1])
    whole = step[: tiles.shape[0] * COLUMNS].view(-1, 1, COLUMNS)
    with exact_products(rows.device):
        torch.bmm(weights.expand(len(tiles), 1, -1), tiles, out=whole)
        torch.mv(rest.T, weights, out=step[whole.numel() :])
    return step


@contextmanager
def exact_products(device: torch.device, *, autocast: bool = False) -> Iterator[None]:
    """No TensorFloat-32, bfloat16 or autocast inside, whatever the user has chosen for training.

    They keep 11 and 8 bits of a number: Uᵀθ − Uᵀθ_r would be lost in the rounding of Uᵀθ. CPUs with
    bfloat16 products take these at ``torch.set_float32_matmul_precision("medium")``. The setting is
    the process's, not the thread's. Autocast is on where ``optimizer.step()`` is called under it.

    Args:
        device: where the products are taken.
        autocast: leave autocast as it is, for passes of a model that may not run without.
    """
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if casts and not autocast else nullcontext():
        if not rounds_products(device):
            yield
            return
        before = _precision(device)
        _set_precision(device, "ieee" if _own_setting(device) else "highest")
        try:
            yield
        finally:
            _restore_precision(device, before)


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 keep fewer bits, by the user's choice for training."""
    return _precision(device) not in ("ieee", "none", "highest")


def _own_setting(device: torch.device) -> Any:
    """Where a device's precision is set from torch 2.9 on, or None.

    Before, there is one setting for all devices; later torch raises where that is read after
    both have been written.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None


def _precision(device: torch.device) -> str:
    own = _own_setting(device)
    return str(torch.get_float32_matmul_precision() if own is None else own.fp32_precision)


def _set_precision(device: torch.device, precision: str) -> None:
    own = _own_setting(device)
    if own is None:
        torch.set_float32_matmul_precision(precision)
    else:
        own.fp32_precision = precision


def _restore_precision(device: torch.device, before: str) -> None:
    """As it was; what followed torch's general setting follows it again."""
    own = _own_setting(device)
    if own is not None:
        own.fp32_precision = "none"
        if own.fp32_precision == before:
            return
    _set_precision(device, before)


def _tiles(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Views of rows ``(m, n)``: tiles ``(t, m, COLUMNS)``, and the columns left over."""
    whole = rows.shape[1] // COLUMNS * COLUMNS
    return rows[:, :whole].unflatten(1, (-1, COLUMNS)).transpose(0, 1), rows[:, whole:]


def mixed(weights: Tensor, block: Tensor) -> Tensor:
    """Linear combinations of rows: ``weights (k, m)`` times ``block (m, *shape)``."""
    with exact_products(block.device):
        return (weights.to(block) @ as_matrix(block)).view(weights.shape[0], *block.shape[1:])


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype with the largest rounding unit."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def row_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which gradients and bases of a parameter are kept: float32, or float64."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
