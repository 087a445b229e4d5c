r"""ElasticPull: a pull back to the aligned model, stronger where the safety loss is sharper.

The subspace holds the few directions in which the alignment loss is sharpest. What is left of the
safety curvature is small in each direction and lies in very many, and a long way in them costs
alignment, too. Of it the diagonal is kept: after a step of the base optimizer

    minimise over θ   ½‖θ − θ'‖² + ½ τr Σ_i f_i (θ_i − θ₀_i)²,      f = F / mean F

    that is           θ_i ← θ'_i + w_i (θ₀_i − θ'_i),                w = τrf / (1 + τrf)

with F the diagonal of the empirical Fisher matrix: the mean of the squared per-example gradients of
all safety examples looked at so far, which every refresh computes anyway. They are gradients of the
log-odds (`safeopt.curvature.window`), for that of the loss vanishes where a refusal is certain. The
mean of F is taken over its entries that are not zero. r is the last step's share of the way so far,
η_t / Σ_s η_s. So τ has no unit: an entry that is driven steadily comes as far as 1 / (1 + τf) of
its way without the pull, whatever the learning rate, its schedule and the number of steps. A pull
that does not shrink with the rate would bring back the aligned model where a schedule ends.

Source: the quadratic penalty is that of Kirkpatrick et al. 2017 (arXiv 1612.00796); as a proximal
step, which no preconditioner of the base optimizer distorts, and with its relative strength, it is
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.basis import Basis
from safeopt.distributed import Layout, local
from safeopt.rows import GradientRows, row_dtype


@dataclass(frozen=True)
class ElasticPull:
    """The aligned model's parameters and the diagonal of the safety curvature.

    Attributes:
        blocks: for each parameter θ₀ and the sum of squared gradients, shape ``(2, *p.shape)``,
            float32 or float64; this process's part of them.
        mean: of the sums that are not zero, over all parameters; 0 if none is.
    """

    blocks: list[Tensor]
    mean: float

    @classmethod
    def at(cls, params: Sequence[Tensor]) -> ElasticPull:
        """The pull to the present parameters, with no curvature yet."""
        parts = [local(p).detach() for p in params]
        return cls(
            [torch.stack([p, torch.zeros_like(p)]).to(row_dtype(p)) for p in parts], mean=0.0
        )

    def observed(self, squares: Sequence[Tensor], layout: Layout) -> ElasticPull:
        """With the `squares` of more examples; this one stays as it is."""
        blocks = [
            torch.stack([block[0], block[1] + more])
            for block, more in zip(self.blocks, squares, strict=True)
        ]
        sums = [block[1] for block in blocks]
        device = sums[0].device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for s in sums:
            found = (s.sum(dtype=torch.float64), s.count_nonzero().double())
            total += torch.stack(found).to(device)
        total = layout.sum(total)
        return ElasticPull(blocks, float(total[0] / total[1].clamp(min=1)))

    @torch.no_grad()
    def apply(self, params: Sequence[Tensor], strength: float, basis: Basis) -> Tensor:
        """Pull the parameters, in place and in their own dtypes: θ += w ⊙ (θ₀ − θ).

        Args:
            params: the protected parameters after the base optimizer's step.
            strength: τr.
            basis: U.

        Returns:
            Uᵀ of what was added, shape ``(k,)``, float64.
        """
        parts = [local(p) for p in params]
        moves = self._moves(parts, strength)
        torch._foreach_add_(parts, [m.to(p.dtype) for m, p in zip(moves, parts, strict=True)])
        return basis.coordinates(moves)

    def _moves(self, parts: Sequence[Tensor], strength: float) -> Sequence[Tensor]:
        """What the pull adds, w ⊙ (θ₀ − θ), in the dtype of the blocks."""
        here = [p.to(b.dtype) for p, b in zip(parts, self.blocks, strict=True)]
        moves = torch._foreach_sub([block[0] for block in self.blocks], here)
        relative = strength / self.mean if self.mean else 0.0
        weights = torch._foreach_mul([block[1] for block in self.blocks], relative)
        torch._foreach_mul_(moves, weights)
        torch._foreach_add_(weights, 1.0)
        torch._foreach_div_(moves, weights)
        return moves


def squares(rows: GradientRows, factors: Tensor) -> list[Tensor]:
    """Sums of squared gradients, for each parameter of shape ``(*p.shape)``.

    Args:
        rows: gradients of examples.
        factors: what each of the first ones is multiplied with; those after them do not count.
    """
    sums = []
    for i in range(len(rows.shapes)):
        block = rows.block(i)[: len(factors)]
        weights = factors.square().to(block).view(-1, *[1] * (block.dim() - 1))
        sums.append((block.square() * weights).sum(0))
    return sums
