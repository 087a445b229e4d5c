"""CompressedBasis: for each weight matrix k small cores between two shared sets of columns.

A direction's part of one weight, u_j (d_out×d_in), is kept in Tucker-2 form,

    u_j ≈ Q_b C_j Q_aᵀ,        Q_b (d_out×r_b), Q_a (d_in×r_a) orthonormal and shared by all k

Numbers: r_b·d_out + r_a·d_in + k·r_b·r_a, two bytes each (bfloat16, computed with in float32).
Uᵀθ is ⟨C_j, Q_bᵀ θ Q_a⟩, so that a step costs what a forward pass of min(r_a, r_b) tokens costs.
Norms, biases and small matrices stay dense.

At a refresh the new directions L·U + R·G_new lie, matrix by matrix, in the columns of the old Q and
of the new tokens' factors (`safeopt.factored`). There they are written as cores, whose Gram
matrices along either side give the best Q (sequentially truncated higher-order SVD, Vannieuwenhoven
et al. 2012). Ranks follow from one number, the share of the energy Σ_j‖u_j‖² to keep: first each
matrix loses a little of its own, then the columns of all matrices that carry the least energy for
their bytes go. The window's examples share that loss between the refreshes that they go through,
so that it does not add up. What is left and rounded, D, is not orthonormal any more, so that a k×k
matrix W in float64 stands before it, U = W·D with W (D Dᵀ) Wᵀ = I: UᵀU = I holds for the directions
as they are stored. One matrix is worked on at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from safeopt.curvature.bases.tucker import Tucker, compressed, cores_of
from safeopt.curvature.basis import CarriedRows, whitening
from safeopt.factored import FactoredRows
from safeopt.rows import as_matrix, exact_products, flat_products, mixed, row_dtype

logger = logging.getLogger("safeopt")

# The share of the energy that is kept.
ENERGY = 0.97
# Matrices with a side up to this stay dense: the Q would be as large.
SMALL = 32
# The share of the energy to lose that each matrix may lose by itself.
_OWN_SHARE = 0.25
# A direction of which less than this was kept is not one any more.
_LOST = 0.05


Block = Union[Tensor, Tucker]  # noqa: UP007 - also read at run time


class CompressedBasis:
    """k orthonormal directions, matrices in Tucker-2 form.

    Args:
        blocks: D, for each parameter directions ``(k, *p.shape)``, or their Tucker form.
        weights: W, shape ``(k, k)``, float64.
        energy: the share of the directions' energy that was kept, between 0 and 1: by the last
            update, times what the old gradients in it had lost before.
        loss: the share that the next update may lose.
    """

    kind: ClassVar[str] = "compressed"

    def __init__(
        self,
        blocks: Sequence[Block],
        weights: Tensor,
        energy: float = 1.0,
        loss: float | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.weights = weights
        self.energy = energy
        self._loss = 1 - ENERGY if loss is None else loss

    @classmethod
    def empty(cls, params: Sequence[Tensor]) -> CompressedBasis:
        """The basis without a direction."""
        weights = torch.zeros(0, 0, dtype=torch.float64, device=params[0].device)
        return cls([_empty(p.detach()) for p in params], weights)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], params: Sequence[Tensor]) -> CompressedBasis:
        """The basis of a `state_dict`, on the parameters' devices; its tensors are not copied.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        blocks: list[Block] = [
            x[0].to(p.device) if len(x) == 1 else Tucker(*(t.to(p.device) for t in x))
            for x, p in zip(state["blocks"], params, strict=False)
        ]
        weights = state["weights"].to(params[0].device)
        ranks = {len(_entries(block)) for block in blocks}
        fit = len(state["blocks"]) == len(params) and ranks == {len(weights)}
        fit = fit and weights.shape == (len(weights), len(weights))
        if not (fit and all(_fits(b, p) for b, p in zip(blocks, params, strict=True))):
            raise ValueError(
                f"its shapes do not fit the parameters ({len(state['blocks'])} blocks for "
                f"{len(params)} parameters)"
            )
        return cls(blocks, weights, float(state["energy"]))

    def state_dict(self) -> dict[str, Any]:
        """The tensors of each block, W, and the energy kept."""
        blocks = [[b.left, b.cores, b.right] if isinstance(b, Tucker) else [b] for b in self.blocks]
        return {
            "kind": self.kind,
            "blocks": blocks,
            "weights": self.weights,
            "energy": self.energy,
        }

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return len(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes that the basis occupies."""
        return sum(block.nbytes for block in self.blocks) + self.weights.nbytes

    @property
    def work(self) -> int:
        """Multiplications for one set of coordinates; `expand_into` needs as many."""
        return sum(b.work if isinstance(b, Tucker) else b.numel() for b in self.blocks)

    def coordinates(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Uᵀv, shape ``(k,)``, float64; None stands for zeros."""
        total = torch.zeros(self.rank, dtype=torch.float64, device=self.weights.device)
        for stored, tensor in zip(self.blocks, tensors, strict=True):
            if tensor is None or not _entries(stored).numel():
                continue
            block = _full(stored)
            entries = _entries(block)
            vector = tensor.detach().to(entries.dtype)
            if isinstance(block, Tucker):
                vector = block.core_of(vector)
            part = flat_products(as_matrix(entries), vector.reshape(1, -1))
            total += part.squeeze(1).to(total.device)
        return self.weights @ total

    @torch.no_grad()
    def expand_into(self, tensors: Sequence[Tensor], coordinates: Tensor) -> None:
        """Add U·coordinates to ``tensors`` in place, in their own dtype."""
        inner = coordinates.to(self.weights) @ self.weights
        for stored, tensor in zip(self.blocks, tensors, strict=True):
            if not _entries(stored).numel():
                continue
            block = _full(stored)
            if not isinstance(block, Tucker):
                step = mixed(inner.unsqueeze(0), block)[0]
                tensor.add_(step.view(tensor.shape).to(tensor.dtype))
                continue
            left, right = block.expanded(inner)
            with exact_products(tensor.device):
                if left.dtype == tensor.dtype:
                    tensor.addmm_(left, right)
                else:
                    tensor.add_((left @ right).to(tensor.dtype))

    def inner(self, other: CompressedBasis) -> Tensor:
        """Inner products with another basis, shape ``(k, k_other)``, float64."""
        return self.weights @ _products(self.blocks, other.blocks, self.weights) @ other.weights.T

    def coordinates_of(self, rows: FactoredRows) -> Tensor:
        """Rows in the basis, shape ``(m, k)``, float64."""
        total = torch.zeros(len(rows), self.rank, dtype=torch.float64, device=self.weights.device)
        if self.rank:
            for index, stored in enumerate(self.blocks):
                block = _full(stored)
                if isinstance(block, Tucker):
                    row = cores_of(rows, index, block.left, block.right)
                else:
                    row = rows.block(index)
                part = flat_products(as_matrix(row), as_matrix(_entries(block)))
                total += part.to(total.device)
        return total @ self.weights.T

    def window(self, coefficients: Tensor, rows: FactoredRows) -> CarriedRows:
        """Old gradients in this basis, ``coefficients (w, k)``, followed by new ones."""
        old, new = len(coefficients), len(rows)
        # An example goes through (old + new) / new updates: each may lose its part.
        loss = (1 - ENERGY) * new / (old + new)
        energy = (old * self.energy + new) / (old + new)
        return CarriedRows(
            CompressedBasis(self.blocks, self.weights, energy, loss), coefficients, rows
        )

    @torch.no_grad()
    def updated(
        self, left: Tensor, right: Tensor, rows: FactoredRows
    ) -> tuple[CompressedBasis, Tensor]:
        """Directions left·U + right·G_new, compressed and orthonormalised; which were kept.

        ``left`` and ``right`` have to make orthonormal directions: the energy is counted for these.
        """
        if not isinstance(rows, FactoredRows):
            raise TypeError(
                f"rows={type(rows).__name__}: a compressed basis is made of factored gradients, "
                "see safeopt.per_example.factored_gradients"
            )
        blocks = self._combined(left @ self.weights, right, rows)
        products = _products(blocks, blocks, self.weights)
        energy = self.energy * float(products.diagonal().mean()) if len(left) else 1.0
        kept = _independent(products)
        if len(kept) < len(left):
            blocks = [b.select(kept) if isinstance(b, Tucker) else b[kept] for b in blocks]
        basis = CompressedBasis(blocks, whitening(products[kept][:, kept]), energy)
        logger.info(
            "compressed basis: %d directions, %.1f%% of their energy kept, %.1f MB",
            basis.rank,
            100 * basis.energy,
            basis.nbytes / 1e6,
        )
        return basis, kept

    def _combined(self, left: Tensor, right: Tensor, rows: FactoredRows) -> list[Block]:
        """Directions left·D + right·G_new, compressed: not orthonormal any more."""
        blocks: list[Block] = []
        columns = []  # of both sides of each matrix: their energies, and the bytes each one costs
        for index, block in enumerate(self.blocks):
            if not isinstance(block, Tucker) or rows.is_dense(index):
                blocks.append(mixed(left, _whole(block)) + mixed(right, rows.block(index)))
                continue
            new, energies = compressed(block, left, right, rows, index, self._loss * _OWN_SHARE)
            k, r_b, r_a = new.cores.shape
            columns.append((index, energies[0], len(new.left) + k * r_a))
            columns.append((index, energies[1], len(new.right) + k * r_b))
            blocks.append(new)
        kept_energy = sum(float(_entries(b).double().square().sum()) for b in blocks)
        ranks = _ranks(columns, kept_energy - (1 - self._loss) * len(left))
        for index, (r_b, r_a) in ranks.items():
            blocks[index] = blocks[index].trimmed(r_b, r_a)  # type: ignore[union-attr]
        return blocks


def _ranks(columns: Sequence[tuple[int, Tensor, int]], loss: float) -> dict[int, tuple[int, int]]:
    """Ranks of each matrix once columns with little energy for their bytes are gone.

    Args:
        columns: for each side of each matrix its index, energies and the bytes of a column; the
            two sides of a matrix follow each other.
        loss: the energy that may be lost in all.
    """
    if not columns:
        return {}
    gain = torch.cat([energies / size for _, energies, size in columns])
    energy = torch.cat([energies for _, energies, _ in columns])
    order = gain.argsort()
    gone = torch.zeros_like(gain, dtype=torch.bool)
    gone[order] = energy[order].cumsum(0) <= loss
    parts = gone.split([len(energies) for _, energies, _ in columns])
    kept = [max(1, int((~part).sum())) for part in parts]
    return {index: (kept[i], kept[i + 1]) for i, (index, _, _) in enumerate(columns) if i % 2 == 0}


def _independent(products: Tensor) -> Tensor:
    """Which directions still are directions after the compression: indices, in their order."""
    kept = torch.arange(len(products), device=products.device)
    while len(kept):
        part = products[kept][:, kept]
        values, vectors = torch.linalg.eigh(part)
        if float(values[0]) > _LOST:
            break
        # Leave out the direction that the weakest combination consists of.
        weakest = int(vectors[:, 0].abs().argmax())
        kept = torch.cat([kept[:weakest], kept[weakest + 1 :]])
    return kept


def _products(mine: Sequence[Block], theirs: Sequence[Block], like: Tensor) -> Tensor:
    """Inner products D·D'ᵀ, float64, on the device of ``like``."""
    sizes = len(_entries(mine[0])), len(_entries(theirs[0]))
    total = like.new_zeros(sizes)
    if total.numel():
        for left, right in zip(mine, theirs, strict=True):
            full = _full(left)
            total += _inner(full, full if right is left else _full(right)).to(total.device)
    return total


def _inner(mine: Block, theirs: Block) -> Tensor:
    if isinstance(mine, Tucker) and isinstance(theirs, Tucker):
        with exact_products(mine.left.device):
            cores = (mine.left.T @ theirs.left) @ theirs.cores @ (theirs.right.T @ mine.right)
        return flat_products(mine.cores.flatten(1), cores.flatten(1))
    if isinstance(mine, Tucker):
        return _inner(theirs, mine).T
    whole = _whole(theirs)
    return flat_products(as_matrix(mine), as_matrix(whole))


def _full(block: Block) -> Block:
    """A block in the dtype in which it is computed with."""
    return block.full() if isinstance(block, Tucker) else block


def _whole(block: Block) -> Tensor:
    """A block's directions as they are, ``(k, *p.shape)``."""
    if isinstance(block, Tucker):
        block = block.full()
        with exact_products(block.left.device):
            return block.left @ block.cores @ block.right.T
    return block


def _entries(block: Block) -> Tensor:
    return block.cores if isinstance(block, Tucker) else block


def _empty(p: Tensor) -> Block:
    dtype = row_dtype(p)
    if p.dim() == 2 and min(p.shape) > SMALL:
        q_b, q_a = (p.new_empty((size, 0), dtype=dtype) for size in p.shape)
        return Tucker(q_b, p.new_empty((0, 0, 0), dtype=dtype), q_a).rounded()
    return p.new_empty((0, *p.shape), dtype=dtype)


def _fits(block: Block, p: Tensor) -> bool:
    if not isinstance(block, Tucker):
        return block.shape[1:] == p.shape
    r_b, r_a = block.cores.shape[1:]
    sides = [(len(block.left), block.left.shape[1]), (len(block.right), block.right.shape[1])]
    return p.dim() == 2 and sides == [(p.shape[0], r_b), (p.shape[1], r_a)]
