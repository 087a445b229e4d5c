"""The gradients and the rate of a base optimizer's step, whatever it does with the gradients."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW

from safeopt.optim.base_step import BaseStep


class Writing(SGD):
    """Halves the gradients in place from one of its steps on."""

    def __init__(self, params, first=1, through=lambda g: g):
        super().__init__(params, lr=0.1)
        self.first, self.through, self.taken = first, through, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        if self.taken >= self.first:
            for p in self.param_groups[0]["params"]:
                self.through(p.grad).mul_(0.5)
        return super().step(closure)


class Replacing(SGD):
    """Puts other tensors in the gradients' place."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad / 2
        return super().step(closure)


def steps(make, count, given=torch.clone):
    """What is found of each step: (whether it is right, whether it was copied)."""
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    optimizer, step, found = make(params), BaseStep(), []
    for _ in range(count):
        expected = [torch.randn_like(p) for p in params]
        for p, g in zip(params, expected, strict=True):
            p.grad = given(g)
        step.begins(optimizer, params)
        copied = any(copy is not None for copy in step._copies)
        optimizer.step()
        rate, gradients = step.ends(optimizer, params)
        assert rate == optimizer.param_groups[0]["lr"]
        known = [g is not None for g in gradients]
        assert all(known) or not any(known)
        right = all(known) and all(map(torch.equal, gradients, expected))
        assert right or not any(known), "wrong gradients are worse than none"
        found.append((right, copied))
    return found


@pytest.mark.parametrize(
    "make",
    [
        partial(AdamW, foreach=True), partial(AdamW, foreach=False), partial(AdamW, fused=True),
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1), Replacing,
    ],
)  # fmt: skip
def test_gradients_that_are_left_alone_are_not_copied(make):
    assert steps(make, 10) == [(True, False)] * 10


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_copied_for_nesterov(foreach):
    make = partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    assert steps(make, 4) == [(True, True)] * 4


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (Writing, 1),
        (partial(Writing, first=11), 11),
        # which autograd does not count, but in the first steps the norms tell
        (partial(Writing, through=lambda g: g.data), 1),
        (partial(Writing, first=8, through=lambda g: g.data), 8),
    ],
)
def test_who_writes_to_gradients_costs_one_steps_and_is_known_from_then_on(make, first):
    found = steps(make, first + 3)
    assert found == [(True, False)] * (first - 1) + [(False, False)] + [(True, True)] * 3


def test_gradients_of_inference_mode_have_no_count():
    @torch.inference_mode()
    def given(gradient):
        return gradient.clone()

    assert steps(AdamW, 10, given) == [(True, True)] * 10
