"""BaseStep: the learning rate and the gradients of a base optimizer's step.

Some optimizers compute inside of the gradients: schedule-free ones divide them, torch's foreach SGD
adds Nesterov's momentum to them, others clip or centre them. What is in ``p.grad`` after such a
step is no gradient any more. Which optimizers do so, and in which of their steps, is not known
beforehand, but for those two, and copies of all gradients take memory:

- of an optimizer that is known to write to gradients they are copied;
- of one that is not known they are copied in the first steps, and compared after each: who has
  changed them is known from then on;
- of those of packages which leave them alone, and of any other after the first steps, autograd's
  count of writes to each gradient is watched. A step that writes for the first time costs its own
  gradients: they are not known, and none is taken for them. From then on they are copied.

A fused step writes to gradients only under a `GradScaler`, where it divides them by the loss scale
itself: of a fused group's parameters the gradients are those that it leaves.

Not noticed, where they begin after the first steps, are writes that autograd does not count:
through ``.data``, by kernels of an optimizer's own, by foreach operations on DTensors. A step hook
that changes gradients, as by clipping them, belongs before the one that calls `BaseStep.begins`;
registered later it counts as a part of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.distributed import locals_of
from safeopt.optim.groups import largest_learning_rate
from safeopt.optim.schedule_free import is_schedule_free, scheduled_rate

_COMPARED = 8  # first steps, in which a stranger's gradients are copied
# Packages whose optimizers leave gradients alone, but for what `_known_to_write` tells.
_KNOWN = {"torch", "bitsandbytes", "safeopt"}


class BaseStep:
    """Follows the steps of one optimizer.

    Cost: in the first steps of an optimizer that is not known, and in all of one that writes to
    gradients, a copy of them for as long as a step takes.
    """

    def __init__(self) -> None:
        self._taken = 0  # steps
        self._writes = False  # whether the optimizer has written to gradients
        self.forget()

    def forget(self) -> None:
        """Let go of a step that has begun."""
        self._rate = 0.0  # a hook may take a scheduler's step before `ends`
        self._gradients: list[Tensor | None] = []  # themselves, None where fused
        self._copies: list[Tensor | None] | None = None  # this process's parts
        self._counts: list[int] = []  # of the writes to them, where nothing is copied

    def begins(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        """Note the gradients that the step will be taken with; call it when they are computed."""
        self.forget()
        self._rate = largest_learning_rate(optimizer)
        groups = optimizer.param_groups
        fused = {id(p) for group in groups if group.get("fused") for p in group["params"]}
        self._gradients = [None if id(p) in fused else p.grad for p in params]
        # Of tensors made in inference mode nobody counts the writes: better a copy too many.
        uncounted = any(g is not None and g.is_inference() for g in self._gradients)
        self._writes = self._writes or uncounted or _known_to_write(optimizer)
        if self._writes or (self._taken < _COMPARED and not _is_known(optimizer)):
            found = locals_of(self._gradients)
            self._copies = [None if g is None else g.detach().clone() for g in found]
        else:
            self._counts = self._written()

    def ends(
        self, optimizer: Optimizer, params: Sequence[Tensor]
    ) -> tuple[float, list[Tensor | None]]:
        """What the step that has just been taken was taken with.

        Args:
            optimizer: as for `begins`.
            params: as for `begins`.

        Returns:
            The largest learning rate in effect, 0 where nothing has moved; and for each parameter
            its gradient, or this process's part of it: None where it has none, or none is left.
        """
        rate = scheduled_rate(optimizer)
        rate = self._rate if rate is None else rate
        found = self._copies
        self._taken += 1  # here, for with a closure a step begins twice
        if found is None:
            self._writes = self._written() != self._counts
            # Themselves: an optimizer may have put other tensors there.
            pairs = zip(params, self._gradients, strict=True)
            found = [None if p.grad is None else g for p, g in pairs]
            if self._writes:
                self.forget()
                return rate, [None] * len(params)
        elif not self._writes:
            self._writes = not all(map(_same, locals_of(self._gradients), found))
        self.forget()
        return rate, [p.grad if g is None else g for p, g in zip(params, found, strict=True)]

    def _written(self) -> list[int]:
        """Autograd's counts of the writes to each gradient; of a DTensor its own and its part's."""
        both = (*self._gradients, *locals_of(self._gradients))
        return [-1 if g is None else g._version for g in both]


def _same(gradient: Tensor | None, copy: Tensor | None) -> bool:
    """Whether a gradient has been left alone; of a sparse one its writes tell."""
    if gradient is None or copy is None or gradient.layout != torch.strided:
        return True
    return torch.equal(gradient.nan_to_num(), copy.nan_to_num())


def _is_known(optimizer: Optimizer) -> bool:
    """Whether its step is one of the packages that leave gradients alone."""
    return type(optimizer).step.__module__.partition(".")[0] in _KNOWN


def _known_to_write(optimizer: Optimizer) -> bool:
    """Whether these are Nesterov's momentum, unless fused, or a schedule-free optimizer."""
    groups = optimizer.param_groups
    nesterov = any(group.get("nesterov") and not group.get("fused") for group in groups)
    return nesterov or is_schedule_free(optimizer)
