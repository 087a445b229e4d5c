"""The gradients and the rate of a base optimizer's step, whatever it does with the gradients."""

import inspect
from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from safeopt.optim.base_step import BaseStep

# All that a model's parameters can be given to, with one step a call.
TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
)


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
        copied = step._copies is not None and any(copy is not None for copy in step._copies)
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
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)  # fmt: skip
def test_gradients_are_not_copied_for_torchs_own_optimizers(make):
    assert steps(make, 10) == [(True, False)] * 10


@pytest.mark.parametrize("make", [Replacing, partial(Writing, first=99)])
def test_a_strangers_gradients_are_copied_in_the_first_steps(make):
    assert steps(make, 10) == [(True, True)] * 8 + [(True, False)] * 2


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_torchs_own_optimizers_leave_gradients_alone(name, foreach, options):
    """Those that are not copied for, in as many steps as a stranger is watched."""
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5, 2))]
    kind = getattr(torch.optim, name)
    options = {"foreach": foreach, **options}
    taken = inspect.signature(kind).parameters
    if not options.keys() <= taken.keys() or (name == "Adafactor" and foreach):
        pytest.skip("it has no such option")
    optimizer = kind(params, lr=1e-2, **options)
    for _ in range(8):
        before = [torch.randn_like(p) for p in params]
        for p, g in zip(params, before, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_copied_for_nesterov(foreach):
    make = partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    assert steps(make, 4) == [(True, True)] * 4


@pytest.mark.parametrize(
    "make",
    [
        Writing,
        partial(Writing, first=8),
        partial(Writing, through=lambda g: g.data),  # which autograd does not count
    ],
)
def test_gradients_that_are_written_to_are_copied_always(make):
    assert steps(make, 12) == [(True, True)] * 12


def test_who_begins_to_write_later_costs_one_steps_gradients():
    found = steps(partial(Writing, first=11), 14)
    assert found == [(True, True)] * 8 + [(True, False)] * 2 + [(False, False)] + [(True, True)] * 3


def test_gradients_of_inference_mode_have_no_count():
    @torch.inference_mode()
    def given(gradient):
        return gradient.clone()

    assert steps(AdamW, 10, given) == [(True, True)] * 10


def test_gradients_that_are_no_numbers_are_no_writes():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer, step = Writing([p], first=99), BaseStep()
    for _ in range(9):
        p.grad = torch.tensor([1.0, float("nan"), float("inf")])
        step.begins(optimizer, [p])
        optimizer.step()
        step.ends(optimizer, [p])
    assert step._copies is None
    step.begins(optimizer, [p])
    assert step._copies is None
