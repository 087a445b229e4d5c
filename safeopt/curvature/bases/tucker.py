"""One weight matrix of a compressed basis: u_j = Q_b C_j Q_aᵀ, and how it is renewed.

New directions L·U + R·G_new lie in the columns of the old Q and of the new tokens' factors. There
they are cores, whose Gram matrices along either side give the best Q: sequentially truncated
higher-order SVD (Vannieuwenhoven, Vandebril and Meerbergen 2012).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.factored import FactoredRows
from safeopt.rows import exact_products, mixed, row_dtype

# What is computed in float32 is kept in half of its bytes: the rounding, 0.2% of a number, is far
# below what compression leaves out.
STORED = torch.bfloat16
# The most columns of Q: they bound the bytes where the energy cannot be kept.
LARGEST_RANK = 256
# Directions of the new tokens that together carry less than this share are left out at once.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Tucker:
    """u_j = Q_b C_j Q_aᵀ for one weight matrix.

    Attributes:
        left: Q_b, shape ``(d_out, r_b)``, orthonormal columns (to rounding, where they are stored
            in bfloat16), the most important first.
        cores: C, shape ``(k, r_b, r_a)``.
        right: Q_a, shape ``(d_in, r_a)``, likewise.
    """

    left: Tensor
    cores: Tensor
    right: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the three."""
        return self.left.nbytes + self.cores.nbytes + self.right.nbytes

    @property
    def work(self) -> int:
        """Multiplications for one set of coordinates."""
        k, r_b, r_a = self.cores.shape
        d_out, d_in = len(self.left), len(self.right)
        first = min(r_b * (d_out * d_in + r_a * d_in), r_a * (d_out * d_in + r_b * d_out))
        return first + k * r_b * r_a

    def to(self, dtype: torch.dtype) -> Tucker:
        """In another dtype."""
        return Tucker(self.left.to(dtype), self.cores.to(dtype), self.right.to(dtype))

    def rounded(self) -> Tucker:
        """As it is stored."""
        return self.to(STORED) if self.cores.dtype == torch.float32 else self

    def full(self) -> Tucker:
        """In the dtype in which it is computed with."""
        return self.to(row_dtype(self.cores))

    def restored(self) -> Tucker:
        """The same directions in `full`, between columns that are orthonormal again."""
        block = self.full()
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(block.left), torch.linalg.qr(block.right)
        with exact_products(block.cores.device):
            return Tucker(q_b, r_b @ block.cores @ r_a.T, q_a)

    def core_of(self, matrix: Tensor) -> Tensor:
        """Q_bᵀ X Q_a of one matrix ``(d_out, d_in)``."""
        with exact_products(matrix.device):
            if self.left.shape[1] <= self.right.shape[1]:
                return (self.left.T @ matrix) @ self.right
            return self.left.T @ (matrix @ self.right)

    def expanded(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_j w_j u_j as a product of two matrices ``(d_out, r)`` and ``(r, d_in)``."""
        core = mixed(weights.unsqueeze(0), self.cores)[0]
        with exact_products(core.device):
            if self.left.shape[1] <= self.right.shape[1]:
                return self.left, core @ self.right.T
            return self.left @ core, self.right.T

    def select(self, directions: Tensor) -> Tucker:
        """Some of the directions."""
        return Tucker(self.left, self.cores[directions], self.right)

    def trimmed(self, r_b: int, r_a: int) -> Tucker:
        """The first columns only."""
        return Tucker(
            self.left[:, :r_b].clone(),
            self.cores[:, :r_b, :r_a].clone(),
            self.right[:, :r_a].clone(),
        )


def compressed(
    block: Tucker, left: Tensor, right: Tensor, rows: FactoredRows, index: int, loss: float
) -> tuple[Tucker, tuple[Tensor, Tensor]]:
    """One matrix's new directions in Tucker form, and the energy of each column of Q_b and Q_a."""
    block = block.restored()
    with exact_products(left.device):
        q_b, q_a = _extended(block, rows, index, right)
        cores = mixed(right, cores_of(rows, index, q_b, q_a))
        if len(block.cores):
            old = mixed(left, block.cores)
            cores[:, : old.shape[1], : old.shape[2]] += old
        v_b, energy_b = _principal(torch.einsum("kij,klj->il", cores, cores), loss)
        cores = torch.einsum("ib,kij->kbj", v_b, cores)
        v_a, energy_a = _principal(torch.einsum("kij,kil->jl", cores, cores), loss)
        return Tucker(q_b @ v_b, cores @ v_a, q_a @ v_a).rounded(), (energy_b, energy_a)


def _extended(
    block: Tucker, rows: FactoredRows, index: int, right: Tensor
) -> tuple[Tensor, Tensor]:
    """The old Q_b and Q_a with columns for what the new tokens add."""
    strength = right.norm(dim=0) * rows.scale  # how much of each example the directions hold
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for left_factor, right_factor, owners in rows.factors(index):
        a = right_factor.to(block.right.dtype)
        share = strength[owners].to(a)
        lengths = a.norm(dim=1) * share
        if left_factor.dim() == 1:
            tokens, place = torch.unique(left_factor, return_inverse=True)
            weight = a.new_zeros(len(tokens)).index_add_(0, place, lengths * lengths)
            b = a.new_zeros(len(block.left), len(tokens))
            b[tokens, torch.arange(len(tokens), device=b.device)] = weight.sqrt()
            columns[0].append(b)
            columns[1].append((a * share.unsqueeze(1)).T)
        else:
            b = left_factor.to(a)
            columns[0].append((b * lengths.unsqueeze(1)).T)
            columns[1].append((a * (b.norm(dim=1) * share).unsqueeze(1)).T)
    if not columns[0]:
        return block.left, block.right
    return _widened(block.left, torch.cat(columns[0], 1)), _widened(
        block.right, torch.cat(columns[1], 1)
    )


def _widened(q: Tensor, columns: Tensor) -> Tensor:
    """Orthonormal columns: q's, and those that ``columns`` add to them."""
    length = torch.linalg.vector_norm(columns)
    if not length:
        return q
    columns = columns / length
    rest = columns - q @ (q.T @ columns)
    # In float64: the energies of tokens differ by more than float32 can hold.
    if rest.shape[1] < rest.shape[0]:
        values, vectors = torch.linalg.eigh((rest.T @ rest).double())
        vectors = rest @ vectors.to(rest)
    else:
        values, vectors = torch.linalg.eigh((rest @ rest.T).double())
        vectors = vectors.to(rest)
    count = _needed(values.flip(0), _NEGLIGIBLE)
    new = vectors.flip(1)[:, :count]
    new = new / new.norm(dim=0).clamp(min=torch.finfo(new.dtype).tiny)
    new = new - q @ (q.T @ new)
    return torch.cat([q, torch.linalg.qr(new).Q], dim=1) if count else q


def _principal(products: Tensor, loss: float) -> tuple[Tensor, Tensor]:
    """Top eigenvectors of one side's Gram matrix, and their energies, largest first."""
    values, vectors = torch.linalg.eigh(products.double())
    energies = values.flip(0).clamp(min=0)
    count = min(LARGEST_RANK, max(1, _needed(energies, loss * float(energies.sum()))))
    return vectors.flip(1)[:, :count].to(products), energies[:count]


def _needed(energies: Tensor, loss: float) -> int:
    """How many of the falling energies are left when as many as possible, up to ``loss``, go."""
    tails = energies.clamp(min=0).flip(0).cumsum(0).flip(0)
    return int((tails > loss).sum())


def cores_of(rows: FactoredRows, index: int, q_b: Tensor, q_a: Tensor) -> Tensor:
    """Q_bᵀ g_i Q_a for every row's part of a matrix, shape ``(m, r_b, r_a)``."""
    with exact_products(q_b.device):
        if rows.is_dense(index):
            return q_b.T @ rows.block(index) @ q_a
        out = q_b.new_zeros(len(rows), q_b.shape[1], q_a.shape[1])
        for left, right, owners in rows.factors(index):
            b = q_b[left] if left.dim() == 1 else left.to(q_b) @ q_b
            a = (right.to(q_a) @ q_a) * rows.scale[owners].to(q_a).unsqueeze(1)
            counts = torch.bincount(owners, minlength=len(rows)).tolist()
            for core, left_part, right_part in zip(
                out, b.split(counts), a.split(counts), strict=True
            ):
                core.addmm_(left_part.T, right_part)
        return out
