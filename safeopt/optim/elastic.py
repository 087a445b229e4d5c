r"""ElasticPull: a pull back to the aligned model, stronger where alignment has more to lose.

The subspace holds the few directions in which the alignment loss is sharpest. What is left of the
safety curvature is small in each direction and lies in very many, and a long way in them costs
alignment, too. Of it the diagonal is kept, and of the task's curvature as well, for an entry on
which the task depends should be left to it. After a step of the base optimizer

    minimise over θ   ½ Σ_i v_i (θ_i − θ'_i)² + ½ τr Σ_i f_i (θ_i − θ₀_i)²

    that is           θ_i ← θ'_i + w_i (θ₀_i − θ'_i),                w = τrf / (v + τrf)

with f = F / ΣF and v = V / ΣV, each entry's share of the whole curvature.

F is the diagonal of the empirical Fisher matrix of the safety examples: the sum of the squared
per-example gradients of all that were looked at so far, which every refresh computes anyway. They
are gradients of the log-odds (`safeopt.curvature.window`), for that of the loss vanishes where a
refusal is certain. V is the sum of the squared task gradients of all steps so far. r is the last
step's share of the way so far, η_t / Σ_s η_s. So τ has no unit: an entry that is driven steadily
comes as far as 1 / (1 + τf/v) of its way without the pull, whatever the learning rate, its schedule
and the number of steps. A pull that does not shrink with the rate would bring back the aligned
model where a schedule ends.

The same holds for an entry that is driven now and then, such as a rare token's row of an embedding:
v counts it by its part in all steps, as the mean of the task loss does, so that what safety asks of
it weighs the more the rarer it is. At the end of that scale, what one early batch alone has moved
comes back by the same share at every further step, for its v falls as r does; what weight decay
alone moves has v = 0 and comes back at once. An entry without safety curvature is left alone.

Source: the quadratic penalty is that of Kirkpatrick et al. 2017 (arXiv 1612.00796), the average of
two models weighted with the Fisher diagonals of both that of Matena and Raffel 2021 (arXiv
2111.09832). As a proximal step after every step, with its relative strength, it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeopt.distributed import Layout, local
from safeopt.optim.copies import put_back
from safeopt.rows import GradientRows, row_dtype

# Where neither the task nor safety has a gradient, nothing is pulled: not 0/0.
_TINY = 1e-30
# An entry's sum of squares stays at this: that of all entries is a float32 still, as it is divided
# by. float32 holds 3e8 such entries.
_MOST = 1e30


class Pulled(NamedTuple):
    """What a step comes to with the pull; nothing has been written yet.

    Attributes:
        pull: the pull.
        params: θ + w ⊙ (θ₀ − θ), this process's part of each parameter, rounded to its own dtype:
            what can be written.
        task: V with the squares of the step's gradients.
    """

    pull: ElasticPull
    params: list[Tensor]
    task: list[Tensor]

    def write(self, params: Sequence[Tensor]) -> None:
        """Write them to the parameters and to the pull, in place."""
        put_back((local(p) for p in params), self.params)
        put_back((block[2] for block in self.pull.blocks), self.task)


@dataclass(frozen=True)
class ElasticPull:
    """The aligned model's parameters and the diagonals of the safety and the task curvature.

    Attributes:
        blocks: for each parameter θ₀, F and V, shape ``(3, *p.shape)``, float32 or float64; this
            process's part of them.
        trace: ΣF over all parameters and processes.
    """

    blocks: list[Tensor]
    trace: float

    @classmethod
    def at(cls, params: Sequence[Tensor]) -> ElasticPull:
        """The pull to the present parameters, with no curvature yet."""
        parts = [local(p).detach() for p in params]
        blocks = [torch.stack([p, torch.zeros_like(p), torch.zeros_like(p)]) for p in parts]
        return cls([b.to(row_dtype(p)) for b, p in zip(blocks, parts, strict=True)], trace=0.0)

    def observed(self, squares: Sequence[Tensor], layout: Layout) -> ElasticPull:
        """With the `squares` of more safety examples; this one stays as it is."""
        blocks = [
            torch.stack([block[0], block[1] + more, block[2]])
            for block, more in zip(self.blocks, squares, strict=True)
        ]
        return ElasticPull(blocks, _trace([block[1] for block in blocks], layout))

    @torch.no_grad()
    def pulled(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        strength: float,
        layout: Layout,
    ) -> Pulled:
        """Where the pull leads after a step; the parameters and V are left as they are.

        Args:
            params: the protected parameters after the base optimizer's step.
            gradients: the task's in this step; finite; of any dtype; None where a parameter has
                none.
            strength: τr.
            layout: of ``params``.
        """
        parts = [local(p) for p in params]
        here = [p.to(b.dtype) for p, b in zip(parts, self.blocks, strict=True)]
        relative = strength / self.trace if self.trace else 0.0
        pulls = torch._foreach_mul([block[1] for block in self.blocks], relative)
        task = self._task_with(gradients)
        counted, trace = task, _trace(task, layout)
        if not trace:  # no task gradient is known: all entries count the same
            counted = [torch.ones_like(v) for v in task]
            trace = _trace(counted, layout)
        totals = torch._foreach_div(counted, trace)
        torch._foreach_add_(totals, pulls)
        torch._foreach_clamp_min_(totals, _TINY)
        torch._foreach_div_(pulls, totals)
        moves = torch._foreach_sub([block[0] for block in self.blocks], here)
        torch._foreach_mul_(moves, pulls)
        torch._foreach_add_(moves, here)
        rounded = [move.to(p.dtype) for move, p in zip(moves, parts, strict=True)]
        return Pulled(self, rounded, task)

    def _task_with(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """V with the squares of a step's task gradients."""
        task = []
        for block, gradient in zip(self.blocks, gradients, strict=True):
            if gradient is None:
                task.append(block[2])
            else:
                total = local(gradient).to(block.dtype).square().add_(block[2])
                task.append(total.clamp_(max=_MOST))
        return task


def _trace(diagonal: Sequence[Tensor], layout: Layout) -> float:
    """Sum of all entries over all processes."""
    total = torch.zeros((), dtype=torch.float64, device=diagonal[0].device)
    for part in diagonal:
        total += part.sum(dtype=torch.float64).to(total.device)
    return float(layout.sum(total))


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
