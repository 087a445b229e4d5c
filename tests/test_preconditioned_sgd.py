"""PreconditionedSGD against the dense inverse, against SGD, and as a torch optimizer."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_table import NEVER, copies, equal, run
from optimizer_table import probe_of as language_probe
from quadratic import Quadratic, dense_basis, orthogonal, probe_of
from tiny_models import tiny_llama, trainable
from tolerances import relative_error

from safeopt import RefreshPolicy
from safeopt.optim import PreconditionedSGD
from safeopt.optim.preconditioner import woodbury


@pytest.fixture(scope="module", autouse=True)
def whole_first_look():
    """The first look takes all ``examples``, so that the subspace is the one a test has chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safeopt.optim.geometry._FEWEST", 10**6)
        yield


# The division alone, without the pull to the aligned model.
OPTIONS = {"trial_examples": 1, "examples": 8, "elastic": 0.0, "refresh": NEVER, "tau": 0.3}


def problem(shapes=((2, 2), (3,), (1, 2)), *, rank=3, seed=0, dtype=torch.float64, scale=1.0):
    """A random quadratic task, and a probe of ``rank`` directions."""
    n = sum(torch.Size(shape).numel() for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    root, gradient = (torch.randn(s, generator=generator).double() for s in ((n, n), (n,)))
    model = Quadratic(root @ root.T / n, gradient, shapes, dtype=dtype, seed=seed)
    basis = orthogonal(n, seed)[:, :rank]
    mix = torch.randn(9, rank, generator=generator).double() * torch.arange(1, rank + 1)
    return model, probe_of(model, math.sqrt(scale) * mix @ basis.T, sharpness=scale)


def build(model, probe, **options):
    params = options.pop("params", None) or list(model.weights)
    chosen = {"lr": 0.05, **OPTIONS, **options}
    return PreconditionedSGD(params, probe=probe, **chosen)


def train(model, optimizer, steps):
    for _ in range(steps):
        model.closure(optimizer)
        optimizer.step()


def inverse(optimizer, tau):
    """(I + UΛUᵀ/τ)⁻¹ as a dense matrix."""
    basis, values = dense_basis(optimizer), optimizer.safety.subspace.eigenvalues
    n = basis.shape[0]
    return torch.linalg.inv(torch.eye(n, dtype=basis.dtype) + (basis * values / tau) @ basis.T)


def reference(model, matrix, steps, *, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    """The update in plain vectors; returns x after every step."""
    x, buffer, path = model.start.clone(), None, []
    for _ in range(steps):
        g = model.hessian @ (x - model.start) + model.slope
        d = g
        if momentum:
            buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
            d = g + momentum * buffer if nesterov else buffer
        x = (1 - lr * weight_decay) * x - lr * matrix @ d
        path.append(x)
    return path


CASES = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_inverse(case, foreach):
    model, probe = problem()
    optimizer = build(model, probe, foreach=foreach, **case)
    train(model, optimizer, 1)
    path = reference(model, inverse(optimizer, 0.3), 6, lr=0.05, **case)
    for step in range(6):
        assert relative_error(model.x, path[step]) < 1e-10
        train(model, optimizer, 1)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),
    st.floats(1e-3, 1e3),
    st.sampled_from(CASES),
)
def test_equals_the_dense_inverse_for_any_shapes(shapes, rank, dtype, seed, tau, case):
    """All parameter shapes, both dtypes, any τ; each parameter in its own group."""
    size = sum(torch.Size(shape).numel() for shape in shapes)
    model, probe = problem(shapes, rank=min(rank, size), seed=seed, dtype=dtype)
    groups = [{"params": [p]} for p in model.weights]
    optimizer = build(model, probe, params=groups, tau=tau, **case)
    train(model, optimizer, 1)
    path = reference(model, inverse(optimizer, tau).to(dtype), 3, lr=0.05, **case)
    train(model, optimizer, 2)
    assert relative_error(model.x, path[-1]) < {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]


class Skewed:
    """A basis whose directions are neither orthogonal nor of length 1, as storage may leave it."""

    def __init__(self, basis, mix):
        self.basis, self.mix, self.rank = basis, mix, basis.rank

    def coordinates(self, tensors):
        return self.mix.T @ self.basis.coordinates(tensors)

    def expand_into(self, tensors, coordinates):
        self.basis.expand_into(tensors, self.mix @ coordinates.to(self.mix))


def test_is_exact_for_a_basis_that_is_not_orthonormal():
    model, probe = problem()
    optimizer = build(model, probe, momentum=0.9)
    optimizer.restore()  # the first estimate
    subspace = optimizer.safety.subspace
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=generator)
    subspace.basis = Skewed(subspace.basis, mix.double())
    overlap = dense_basis(optimizer).T @ dense_basis(optimizer)
    assert (overlap - torch.eye(3, dtype=overlap.dtype)).abs().max() > 0.1
    train(model, optimizer, 4)
    path = reference(model, inverse(optimizer, 0.3), 4, lr=0.05, momentum=0.9)
    assert relative_error(model.x, path[-1]) < 1e-10


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_woodbury_is_the_inverse(k, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(8, k, generator=generator, dtype=torch.float64)
    values = torch.rand(k, generator=generator, dtype=torch.float64)
    values[-1] = 0.0
    matrix = woodbury(values, basis.T @ basis, tau)
    product = torch.eye(8, dtype=torch.float64) + (basis * values / tau) @ basis.T
    identity = product @ (torch.eye(8, dtype=torch.float64) - basis @ matrix @ basis.T)
    assert (identity - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-13 * product.norm() * 8
    assert torch.allclose(matrix, matrix.T)


@pytest.mark.parametrize(
    ("indefinite", "expected"), [("abs", [2.0, 0.5, 1.0]), ("clip", [2.0, 0.5, 0.0])]
)
def test_negative_curvature_by_name(indefinite, expected):
    model, probe = problem()
    optimizer = build(model, probe, indefinite=indefinite)
    optimizer.restore()
    optimizer.safety.subspace.eigenvalues = torch.tensor([2.0, 0.5, -1.0]).double()
    train(model, optimizer, 1)
    optimizer.safety.subspace.eigenvalues = torch.tensor(expected).double()
    path = reference(model, inverse(optimizer, 0.3), 1, lr=0.05)
    assert relative_error(model.x, path[0]) < 1e-10


def test_all_negative_curvature_clipped_is_sgd():
    model, probe = problem()
    optimizer = build(model, probe, indefinite="clip", tau=None)
    optimizer.restore()
    optimizer.safety.subspace.eigenvalues = -optimizer.safety.subspace.eigenvalues
    plain, _ = problem()
    train(model, optimizer, 2)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), 2)
    assert equal(model.parameters(), plain.parameters())


def test_default_tau_makes_an_interval_as_strong_as_damping_at_every_step():
    """τ = λ̄/(κR): over one interval in direction i, R steps of ηu/(1 + λᵢ/τ)."""
    model, probe = problem()
    policy = RefreshPolicy.fixed(50)
    optimizer = build(model, probe, tau=None, damping=2.0, refresh=policy)
    train(model, optimizer, 1)
    tau = float(optimizer.safety.subspace.eigenvalues.mean()) / (2.0 * 50)
    path = reference(model, inverse(optimizer, tau), 1, lr=0.05)
    assert relative_error(model.x, path[0]) < 1e-10


def test_default_tau_is_scale_free():
    """Multiplying the alignment loss by 100 changes nothing."""
    ends = []
    for scale in (1.0, 100.0):
        model, probe = problem(scale=scale)
        train(model, build(model, probe, tau=None, budget=math.inf), 5)
        ends.append(model.moved)
    assert relative_error(ends[1], ends[0]) < 1e-9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("empty", ["no damping", "rank 0"])
def test_without_a_subspace_it_is_sgd_bit_for_bit(case, foreach, empty):
    model, probe = problem()
    options = {"damping": 0.0} if empty == "no damping" else {}
    if empty == "rank 0":
        probe = probe_of(model, torch.zeros(9, len(model.start)), sharpness=0.0)
    optimizer = build(model, probe, foreach=foreach, maximize=True, **options, **case)
    plain, _ = problem()
    case = dict(case)
    decay = case.pop("weight_decay", 0)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05, foreach=False, maximize=True, **case)
    for _ in range(6):
        train(model, optimizer, 1)
        plain.closure(sgd)
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(1 - 0.05 * decay)
        sgd.step()
    assert equal(model.parameters(), plain.parameters())
    state, expected = optimizer.state_dict(), sgd.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    if empty == "no damping":
        assert "safety" not in state
        assert probe.passes.forward == 0
    else:
        assert optimizer.safety.subspace.rank == 0


def test_groups_have_their_own_rates():
    """D·(I + UΛUᵀ/τ)⁻¹d with D the rates: lr=0 stays, protect=False is SGD."""
    model, probe = problem()
    first, second, third = model.weights
    groups = [
        {"params": [first], "lr": 0.02, "momentum": 0.5},
        {"params": [second], "lr": 0.0},
        {"params": [third]},
    ]
    optimizer = build(model, probe, params=groups)
    train(model, optimizer, 1)
    rates = torch.tensor([0.02] * 4 + [0.0] * 3 + [0.05] * 2, dtype=torch.float64)
    expected = -rates * (inverse(optimizer, 0.3) @ model.slope)
    assert relative_error(model.moved, expected) < 1e-10
    assert torch.equal(model.moved[4:7], torch.zeros(3, dtype=torch.float64))

    model, probe = problem()
    groups = [
        {"params": list(model.weights)[:2]},
        {"params": [model.weights[2]], "protect": False, "lr": 0.1},
    ]
    optimizer = build(model, probe, params=groups, momentum=0.9)
    plain, _ = problem()
    sgd = torch.optim.SGD([plain.weights[2]], lr=0.1, momentum=0.9)
    for step in range(3):
        for p, q in zip(model.weights, plain.weights, strict=True):
            p.grad = torch.full_like(p, 1.0 + step)
            q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
    assert torch.equal(model.weights[2], plain.weights[2])
    assert not torch.equal(model.weights[0], model.start[:4].view(2, 2))


def test_the_basis_is_expanded_once_for_each_subspace(monkeypatch):
    """k expansions for UᵀU at a refresh and one for each step's correction; the map needs none."""
    from safeopt.curvature.basis import DenseBasis

    calls = []
    expand = DenseBasis.expand_into
    monkeypatch.setattr(
        DenseBasis, "expand_into", lambda self, *args: (calls.append(1), expand(self, *args))[1]
    )
    model, probe = problem()
    optimizer = build(model, probe, restore_alignment=False, refresh=RefreshPolicy.fixed(3))
    counts = []
    for _ in range(6):
        calls.clear()
        train(model, optimizer, 1)
        counts.append(len(calls))
    assert [entry.step for entry in optimizer.safety.history] == [0, 3, 6]
    assert counts == [3 + 1, 1, 1, 3 + 1, 1, 1]


@pytest.mark.parametrize("mode", ["project", "damp", "acceleration", "budget"])
def test_maps_follow_the_preconditioned_step(mode):
    model, probe = problem()
    optimizer = build(model, probe, mode=mode, budget=0.01)
    train(model, optimizer, 5)
    position = optimizer.safety.vectors()["position"]
    assert relative_error(dense_basis(optimizer).T @ model.moved, position) < 1e-9 or (
        mode == "project" and position.abs().max() == 0
    )


def test_gradients_are_left_alone():
    """Nesterov momentum does not change p.grad, with or without foreach."""
    for foreach in (False, True):
        model, probe = problem()
        optimizer = build(model, probe, momentum=0.9, nesterov=True, foreach=foreach)
        model.closure(optimizer)
        before = [p.grad.clone() for p in model.weights]
        optimizer.step()
        assert equal([p.grad for p in model.weights], before)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumes_bit_for_bit():
    options = {
        "lr": torch.tensor(0.05), "momentum": 0.9, "nesterov": True, "weight_decay": 0.01,
        "rank": 8, "refresh": RefreshPolicy.fixed(4), "budget": 0.0,
    }  # fmt: skip

    def start():
        model = tiny_llama(layers=1)
        return model, PreconditionedSGD(trainable(model), probe=language_probe(model), **options)

    model, optimizer = start()
    run(model, optimizer, 6)
    again, fresh = start()
    again.load_state_dict(through_a_file(model.state_dict()))
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    expected = run(model, optimizer, 4, start=6)
    assert run(again, fresh, 4, start=6) == expected
    assert equal(again.parameters(), model.parameters())
    assert optimizer.safety.counters() == fresh.safety.counters()


def test_schedulers_scalers_and_inert_steps():
    model, probe = problem()
    optimizer = build(model, probe, lr=torch.tensor(0.05))
    before = copies(model.parameters())
    optimizer.step()
    assert optimizer.safety.passes.forward == 0
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model.task() * (math.inf if step == 1 else 1.0)).backward()
        kept = copies(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert equal(model.parameters(), kept) == (step == 1)
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert optimizer.safety.step_count == 2
    assert not equal(model.parameters(), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, r"tau=0\.0: expected a positive number"),
        ({"tau": math.inf}, ValueError, "tau=inf"),
        ({"tau": math.nan}, ValueError, "tau=nan"),
        ({"tau": "x"}, ValueError, "tau='x'"),
        ({"indefinite": "flip"}, ValueError, 'indefinite="flip": expected one of "abs", "clip"'),
        ({"mode": "hard"}, ValueError, 'mode="hard"'),
        ({"damping": -1}, ValueError, "damping=-1"),
        ({"rank": 0}, ValueError, "rank=0"),
        ({"fused": True}, ValueError, "fused=True"),
        ({"differentiable": True}, ValueError, "differentiable=True"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"nesterov": True}, ValueError, "Nesterov"),
        ({"probe": None}, TypeError, "probe=NoneType"),
    ],
)
def test_wrong_arguments_name_themselves(options, error, message):
    model, probe = problem()
    with pytest.raises(error, match=message):
        build(model, options.pop("probe", probe), **copy.copy(options))


def test_sparse_gradients_are_refused():
    model, probe = problem()
    optimizer = build(model, probe)
    before = copies(model.parameters())
    for p in model.weights:
        p.grad = torch.ones_like(p)
    model.weights[-1].grad = torch.ones_like(model.weights[-1]).to_sparse()
    with pytest.raises(TypeError, match="sparse gradients cannot be protected"):
        optimizer.step()
    assert equal(model.parameters(), before)
