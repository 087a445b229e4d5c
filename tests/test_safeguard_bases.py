"""`safeguard` around optimizers of torch, bitsandbytes, schedulefree and pytorch_optimizer."""

import copy
import io
import sys
import warnings
from functools import partial

import bitsandbytes
import pytest
import pytorch_optimizer
import schedulefree
import torch
from optimizer_table import copies, equal
from torch import nn

from safeopt import RefreshPolicy, SafetyProbe, safeguard
from safeopt.distributed import Layout

SAFETY = {"rank": 4, "trial_examples": 2, "refresh": RefreshPolicy.fixed(3), "budget": 0.0}
TORCH = ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adafactor", "Muon"]
EIGHT_BIT = ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit"]
PAGED = [name for name in (*EIGHT_BIT, "PagedAdamW", "PagedLion") if name.startswith("Paged")]
BASES = {
    **{f"torch.{n}": getattr(torch.optim, n) for n in TORCH if hasattr(torch.optim, n)},
    **{f"bitsandbytes.{n}": getattr(bitsandbytes.optim, n) for n in sorted({*EIGHT_BIT, *PAGED})},
    "schedulefree.AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "pytorch_optimizer.AdaBelief": pytorch_optimizer.AdaBelief,
    "pytorch_optimizer.Lion": pytorch_optimizer.Lion,
}  # fmt: skip
# Of pytorch_optimizer: what is left in the gradients after a step is none.
WRITING = [
    "Adalite", "GrokFastAdamW", "LARS", "NovoGrad", "Ranger", "SCIONLight", "SpectralSphere",
    "StableSPAM",
]  # fmt: skip
names = pytest.mark.parametrize("name", BASES)


def gpu(test):
    """Mark a test that needs a GPU: ``python -m pytest -m gpu tests/test_safeguard_bases.py``."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(missing(test))


@pytest.fixture(autouse=True)
def on_a_cpu():
    """bitsandbytes says that it does not page there; the test of paging is for a GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


class Wide(nn.Module):
    """Matrices only, for Muon; one large enough for 8-bit states, which start at 4,096 numbers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, 80, bias=False)
        self.second = nn.Linear(80, 6, bias=False)
        self.inputs = torch.randn(24, width)
        self.targets = torch.randn(24, 6)

    def losses(self, rows):
        outputs = self.second(torch.tanh(self.first(self.inputs[rows])))
        return ((outputs - self.targets[rows]) ** 2).mean(-1)

    def to(self, device):
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        return super().to(device)


def build(name, device="cpu", width=64, **safety):
    model = Wide(width).to(device)
    ids = torch.arange(10).view(-1, 1).repeat(1, 2)
    probe = SafetyProbe(
        model,
        [{"input_ids": ids, "labels": ids}],
        loss=lambda module, batch: module.losses(batch["input_ids"][:, 0]),
    )
    base = BASES[name](model.parameters(), lr=3e-3)
    return model, base, safeguard(base, probe, **{**SAFETY, **safety})


def train(model, optimizer, steps):
    for step in range(steps):
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.zero_grad()
        model.losses(torch.arange(10 + step % 5, 24)).mean().backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()


@names
def test_groups_and_state_are_the_base_optimizers_own(name):
    """It is the same object; a scheduler's rates reach it, and the subspace is kept."""
    model, base, optimizer = build(name, mode="project")
    assert optimizer is base
    assert type(optimizer) is BASES[name]
    groups = optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = copies(model.parameters())
    train(model, optimizer, 2)
    scheduler.step()
    assert optimizer.param_groups is groups is base.param_groups
    assert groups[0]["lr"] == 1.5e-3
    assert not equal(model.parameters(), before)
    c = optimizer.safety.subspace.coordinates(list(model.parameters()))
    assert c.abs().max() < 1e-6
    assert optimizer.safety.step_count == 2


@names
def test_without_protection_it_is_the_base_optimizer_bit_for_bit(name):
    model, _, optimizer = build(name, damping=0)
    train(model, optimizer, 4)
    twin = Wide()
    plain = BASES[name](twin.parameters(), lr=3e-3)
    train(twin, plain, 4)
    assert equal(model.parameters(), twin.parameters())


@pytest.mark.parametrize("base", [pytorch_optimizer.SPlus, schedulefree.AdamWScheduleFreeReference])
def test_other_ways_to_evaluate_at_another_point_are_refused(base, monkeypatch):
    """They keep x itself, or an average of another kind: what is mapped would be thrown away."""
    monkeypatch.setitem(BASES, "other", base)
    model, _, optimizer = build("other")
    with pytest.raises(TypeError, match=f"optimizer={base.__name__}: it evaluates at another"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("base", [*WRITING, "AdaBelief", "ScheduleFreeAdamW"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_the_task_is_known_by_its_own_gradients(base, with_closure, monkeypatch):
    """Not by what an optimizer that computes inside of them has left there."""
    monkeypatch.setitem(BASES, "other", getattr(pytorch_optimizer, base))
    model, _, optimizer = build("other", elastic=1.0, rank=2)
    squares = [torch.zeros_like(p) for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model.losses(torch.arange(10, 24)).mean()
        loss.backward()
        for total, p in zip(squares, model.parameters(), strict=True):
            total += p.grad**2
        return loss

    for _ in range(3):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    found = [block[2] for block in optimizer.safety.pull.blocks]
    assert all(map(partial(torch.allclose, atol=0.0), found, squares))
    assert all(bool(total.any()) for total in squares)


@pytest.mark.parametrize("base", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_warm_up_counts_with_the_rate_in_effect(base, monkeypatch):
    monkeypatch.setitem(BASES, "other", partial(getattr(schedulefree, base), warmup_steps=4))
    model, _, optimizer = build("other", elastic=1.0)
    rates = []
    for _ in range(6):
        train(model, optimizer, 1)
        rates.append(optimizer.safety.last_rate)
    assert rates == pytest.approx([3e-3 * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert optimizer.safety.counters()["travelled"] == pytest.approx(sum(rates))


def test_steps_at_a_rate_of_zero_are_not_counted(monkeypatch):
    """RAdam's first ones, while its variance is not known, leave the model where it is."""
    monkeypatch.setitem(BASES, "other", schedulefree.RAdamScheduleFree)
    model, _, optimizer = build("other", elastic=1.0)
    optimizer.train()
    before = copies(model.parameters())
    counts = []
    for _ in range(6):
        train(model, optimizer, 1)
        counts.append(optimizer.safety.step_count)
        assert equal(model.parameters(), before) == (counts[-1] == 0)
    assert counts[0] == 0
    assert counts[-2:] == [counts[-1] - 1, counts[-1]]
    assert optimizer.safety.last_rate == optimizer.param_groups[0]["scheduled_lr"]


def test_a_refresh_that_fails_needs_no_other_rank(monkeypatch):
    """z is where the map has brought it: after an error there is no sum over the ranks."""

    def summed(*args):
        raise AssertionError("the other ranks are waited for")

    def failing(*args):
        monkeypatch.setattr(Layout, "sum", summed)
        raise RuntimeError("in the middle")

    model, _, optimizer = build("schedulefree.AdamWScheduleFree", mode="project")
    train(model, optimizer, 2)
    monkeypatch.setattr("safeopt.optim.geometry.estimate", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(model, optimizer, 1)
    monkeypatch.undo()
    params, subspace = list(model.parameters()), optimizer.safety.subspace
    assert optimizer.param_groups[0]["train_mode"]
    for point in (params, [optimizer.state[p]["z"] for p in params]):
        assert subspace.coordinates(point).abs().max() < 1e-6


def test_a_parameter_that_is_not_finite_spoils_no_other_one():
    model, _, optimizer = build("schedulefree.AdamWScheduleFree")
    train(model, optimizer, 2)
    optimizer.train()
    optimizer.zero_grad()
    model.losses(torch.arange(10, 24)).mean().backward()
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="parameters are not finite"):
        optimizer.step()
    assert [int((~p.isfinite()).sum()) for p in model.parameters()] == [1, 0]
    assert all(optimizer.state[p]["z"].isfinite().all() for p in model.parameters())


@names
def test_it_forgets_less_than_without(name):
    """The safety examples' loss rises less, with refreshes and restoring."""
    ends = []
    for damping in (0, 1.0):
        model, _, optimizer = build(name, damping=damping)
        start = float(model.losses(torch.arange(10)).mean())
        train(model, optimizer, 9)
        ends.append(float(model.losses(torch.arange(10)).mean()) - start)
    assert len(optimizer.safety.history) == 4
    assert ends[1] < ends[0]


@names
def test_states_resume_bit_for_bit(name):
    assert_that_it_resumes(name)


@pytest.mark.parametrize("base", sorted({*WRITING, "AdaBelief"} - {"SCIONLight"}))
def test_the_pull_resumes_bit_for_bit_beside_optimizers_that_write_to_gradients(base, monkeypatch):
    """SCIONLight's own state holds a function, which ``weights_only`` refuses."""
    monkeypatch.setitem(BASES, "other", getattr(pytorch_optimizer, base))
    assert_that_it_resumes("other", elastic=1.0, rank=2)


def assert_that_it_resumes(name, **options):
    model, _, optimizer = build(name, **options)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, _, fresh = build(name, **options)
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    train(model, optimizer, 4)
    train(again, fresh, 4)
    assert equal(model.parameters(), again.parameters())
    assert optimizer.safety.counters() == fresh.safety.counters()


def copies_without_protection(name):
    """Whether the plain optimizer can be copied at all."""
    model = Wide()
    plain = BASES[name](model.parameters(), lr=3e-3)
    train(model, plain, 1)
    try:
        train(*copy.deepcopy((model, plain)), 1)
    except AttributeError:
        return False
    return True


@names
def test_copies_go_on_alike(name):
    if not copies_without_protection(name):
        pytest.skip("the optimizer itself cannot be copied: its attributes are lost")
    model, _, optimizer = build(name)
    train(model, optimizer, 4)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert equal(model.parameters(), twin.parameters())
    assert other.safety.history == optimizer.safety.history


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_states_have_eight_bits(name):
    model, _, optimizer = build(f"bitsandbytes.{name}")
    train(model, optimizer, 2)
    assert optimizer.state[model.first.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.second.weight]["state1"].dtype == torch.float32


@gpu
@pytest.mark.parametrize("name", PAGED)
def test_paged_states_on_a_gpu(name):
    # bitsandbytes pages states from 100,000 numbers on.
    model, _, optimizer = build(f"bitsandbytes.{name}", device="cuda", width=1280, mode="project")
    train(model, optimizer, 5)
    assert getattr(optimizer.state[model.first.weight]["state1"], "is_paged", False)
    c = optimizer.safety.subspace.coordinates(list(model.parameters()))
    assert c.abs().max() < 1e-5


@gpu
@names
def test_every_base_on_a_gpu(name):
    model, _, optimizer = build(name, device="cuda")
    train(model, optimizer, 7)
    assert [entry.step for entry in optimizer.safety.history] == [0, 3, 6]


def test_all_packages_of_the_table_are_the_real_ones():
    for package in ("bitsandbytes", "schedulefree", "pytorch_optimizer"):
        assert "site-packages" in sys.modules[package].__file__
