"""The pull back to the aligned model, against closed forms in NumPy."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from optimizer_table import OVERWRITING, build, run
from quadratic import Quadratic, probe_of

from safeopt import RefreshPolicy, SafetyProbe, safeguard
from safeopt.distributed import ALONE as ONE_PROCESS
from safeopt.optim.elastic import ElasticPull, squares
from safeopt.rows import DenseRows

SHAPES = [(3, 2), (4,), (2,)]
N = 12
ALONE = {"mode": "none", "restore_alignment": False}  # the pull and nothing else
NEVER = RefreshPolicy(first=10**6, growth=1, every=10**6, drift=None)


def directions():
    """Gradients of seven safety examples; the last parameter has none."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(7, N, generator=generator).double()
    found[:, -2:] = 0
    return found


def start(**options):
    """A model at its aligned parameters, and plain SGD of it, protected."""
    model = Quadratic(torch.zeros(N, N).double(), torch.zeros(N).double(), SHAPES)
    options = {"trial_examples": 1, "rank": 2, **options}
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, safeguard(sgd, probe_of(model, directions()), **options)


def step(model, optimizer, gradient):
    pieces = torch.as_tensor(gradient).split([p.numel() for p in model.weights])
    for p, piece in zip(model.weights, pieces, strict=True):
        p.grad = piece.reshape(p.shape).clone()
    optimizer.step()


def parameters(model):
    return model.x.detach().numpy().copy()


def share(squares):
    """f or v: each entry's share of the diagonal's sum."""
    return squares / squares.sum()


def test_it_is_the_proximal_step_of_the_diagonal_of_all_looks():
    tau, random = 1.7, np.random.default_rng(5)
    policy = RefreshPolicy(first=2, growth=1, every=2, drift=None)
    model, optimizer = start(elastic=tau, refresh=policy, **ALONE)
    origin = x = before = parameters(model)
    rows, order = directions().numpy(), optimizer.safety.rota._pool
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squares, task, travelled, drawn = np.zeros(N), np.zeros(N), 0.0, 0
    for t, rate in enumerate((0.05, 0.02, 0.03, 0.01, 0.0, 0.02)):
        optimizer.param_groups[0]["lr"] = rate
        gradient = random.normal(size=N) * np.arange(N)  # none for the first entry
        step(model, optimizer, gradient)
        if rate == 0:  # no step: nothing is pulled
            assert np.array_equal(parameters(model), before)
            continue
        if t in (0, 2, 5):  # two examples at the aligned model, after two steps, and after four
            look = order[drawn : drawn + 2]
            along = units[look] @ (x - origin)
            squares = squares + ((rows[look] + along[:, None] * units[look]) ** 2).sum(0)
            drawn += 2
        travelled, task = travelled + rate, task + gradient**2
        x = x - rate * gradient
        pull = tau * rate / travelled * share(squares)
        kept = share(task) / np.where(task + squares > 0, share(task) + pull, 1)
        x = origin + kept * (x - origin)
        before = parameters(model)
        assert np.allclose(before, x, rtol=1e-12, atol=1e-14)
        c = optimizer.safety.subspace.coordinates(model.weights)
        assert np.allclose(c, optimizer.safety.vectors()["position"], atol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "to zero"])
def test_a_steady_drive_comes_a_fixed_share_of_its_way(schedule):
    """1/(1 + τf/v) of it, whatever the rate and its schedule: no return at the end of a run."""
    tau, steps = 2.0, 400
    model, optimizer = start(elastic=tau, refresh=NEVER, **ALONE)
    origin, drive, way = parameters(model), np.linspace(-1, 1, N), 0.0
    for t in range(steps):
        rate = 0.01 if schedule == "constant" else 0.01 * (1 - t / steps)
        optimizer.param_groups[0]["lr"] = rate
        step(model, optimizer, drive)
        way += rate
    f = share((directions().numpy()[optimizer.safety.rota._pool[:2]] ** 2).sum(0))
    came = (origin - parameters(model)) / (way * drive)
    assert np.allclose(came, 1 / (1 + tau * f / share(drive**2)), rtol=0.02)
    assert (f > 0.2).any()
    assert np.allclose(came[-2:], 1)  # where there is no curvature


def test_what_is_driven_seldom_keeps_its_share_and_what_is_driven_no_more_comes_back():
    """Rows of an embedding: for frequent, rare and vanished tokens, and for those of no batch."""
    tau, steps = 2.0, 1000
    model, optimizer = start(elastic=tau, refresh=NEVER, **ALONE)
    origin, drive = parameters(model), np.linspace(-1, 1, N)
    often, seldom, early, never = (np.arange(N) % 4 == i for i in range(4))
    way, squares = np.zeros(N), np.zeros(N)
    for t in range(steps):
        on = often | (seldom & (t % 10 == 0)) | (early & (t < 5))
        if t == 1:  # weight decay alone moves the last ones
            torch._foreach_mul_([p.data for p in model.weights], 0.999)
        optimizer.param_groups[0]["lr"] = 0.01
        step(model, optimizer, drive * on)
        way, squares = way + 0.01 * on * drive, squares + (drive * on) ** 2
    f = share((directions().numpy()[optimizer.safety.rota._pool[:2]] ** 2).sum(0))
    moved, driven = origin - parameters(model), often | seldom
    expected = way[driven] / (1 + tau * f[driven] / share(squares)[driven])
    assert np.allclose(moved[driven], expected, rtol=0.1, atol=2e-3)
    gone = (early | never) & (f > 0)
    assert gone.sum() == 4
    assert np.abs(moved[gone]).max() < 1e-9
    assert np.allclose(moved[early & (f == 0)], way[early & (f == 0)], rtol=0.1)


def test_without_task_gradients_all_entries_count_the_same():
    model = Quadratic(torch.zeros(N, N).double(), torch.zeros(N).double(), SHAPES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    sgd.register_step_post_hook(lambda *_: sgd.zero_grad())  # before the protection's own
    probe = probe_of(model, directions())
    optimizer = safeguard(sgd, probe, trial_examples=1, elastic=2.0, refresh=NEVER, **ALONE)
    origin, drive = parameters(model), np.linspace(-1, 1, N)
    step(model, optimizer, drive)
    f = share((directions().numpy()[optimizer.safety.rota._pool[:2]] ** 2).sum(0))
    expected = origin - 0.05 * drive / (1 + 2 * f * N)
    assert np.allclose(parameters(model), expected, rtol=1e-12)


def test_without_safety_curvature_nothing_is_pulled():
    moved = [torch.ones(3)]
    pull = ElasticPull.at([torch.zeros(3)])
    found = pull.pulled(moved, [torch.ones(3)], 2.0, ONE_PROCESS)
    assert torch.equal(found.params[0], moved[0])


def test_a_sum_of_squares_stays_finite():
    """Two entries that have overflowed share what the task depends on."""
    pull = ElasticPull.at([torch.ones(4)]).observed([torch.ones(4)], ONE_PROCESS)
    for _ in range(2):
        gradient = torch.tensor([1e30, 1e30, 0, 0])
        found = pull.pulled([torch.zeros(4)], [gradient], 2.0, ONE_PROCESS)
        assert torch.allclose(found.params[0], torch.tensor([0.5, 0.5, 1, 1]))
        assert bool(found.task[0].isfinite().all())
        found.write([torch.zeros(4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diagonals_of_half_precision_are_float32(dtype):
    """Their own squares would overflow, and their own sums lose what is added late."""
    params = [torch.zeros(2, dtype=dtype)]
    pull = ElasticPull.at(params)
    for _ in range(400):
        found = pull.pulled(params, [torch.full((2,), 512, dtype=dtype)], 1.0, ONE_PROCESS)
        found.write(params)
    assert pull.blocks[0][2].tolist() == [400 * 512.0**2] * 2
    assert found.params[0].dtype == dtype


def test_squares_are_those_of_the_first_rows_times_their_factors():
    rows = [torch.arange(12.0).view(4, 3), torch.arange(4.0)]
    first, second = squares(DenseRows(rows), torch.tensor([2.0, -3.0]))
    assert first.tolist() == [4 * a**2 + 9 * (a + 3) ** 2 for a in range(3)]
    assert float(second) == 9


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("base", OVERWRITING)
def test_the_task_is_known_by_its_own_gradients(base, with_closure):
    """Not by what an optimizer that computes inside of them has left there."""
    model = Quadratic(torch.zeros(N, N).double(), torch.zeros(N).double(), SHAPES)
    plain = OVERWRITING[base](model.parameters(), lr=0.05)
    pulled = {"elastic": 1.0, "trial_examples": 1, "refresh": NEVER}
    optimizer = safeguard(plain, probe_of(model, directions()), **pulled)
    if base == "schedule-free":
        optimizer.train()
    squares = np.zeros(N)
    for drive in (np.linspace(-1, 1, N), np.linspace(0, 3, N)):
        pieces = torch.as_tensor(drive).split([p.numel() for p in model.weights])

        def closure(pieces=pieces):
            for p, piece in zip(model.weights, pieces, strict=True):
                p.grad = piece.reshape(p.shape).clone()

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        squares += drive**2
    found = torch.cat([block[2].flatten() for block in optimizer.safety.pull.blocks])
    assert np.allclose(found, squares, rtol=1e-12)


@pytest.mark.parametrize("basis", ["dense", "int8"])
def test_coordinates_are_those_of_the_parameters_that_were_written(basis):
    """A bfloat16 parameter does not come where the pull leads, but to the number beside it."""
    zeros = torch.zeros(N, N), torch.zeros(N)
    model = Quadratic(*zeros, SHAPES, dtype=torch.bfloat16)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"trial_examples": 1, "elastic": 2.0, "refresh": NEVER, "basis": basis, **ALONE}
    optimizer = safeguard(sgd, probe_of(model, directions().bfloat16()), **options)
    for _ in range(3):
        step(model, optimizer, torch.linspace(-1, 1, N).bfloat16())
        safety = optimizer.safety
        c = safety.subspace.coordinates(model.weights)
        assert torch.allclose(c, safety.vectors()["position"], rtol=0, atol=1e-6)


def test_a_step_that_cannot_be_protected_is_not_counted():
    model, optimizer = start(elastic=2.0, refresh=NEVER, **ALONE)
    step(model, optimizer, np.ones(N))
    before = [block.clone() for block in optimizer.safety.pull.blocks]
    with torch.no_grad():
        model.weights[0][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="parameters are not finite"):
        step(model, optimizer, np.ones(N))
    assert all(map(torch.equal, optimizer.safety.pull.blocks, before))


def test_a_state_for_several_processes_is_a_copy(tmp_path):
    """What is filled into it, or trained after it, is not the other one's."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, optimizer = start(elastic=2.0, refresh=NEVER, **ALONE)
        step(model, optimizer, np.ones(N))
        saved = [entry["safety_pull"] for entry in optimizer.state_dict()["state"].values()]
        before = copy.deepcopy(saved)
        step(model, optimizer, np.ones(N))
        assert all(map(torch.equal, saved, before))
    finally:
        dist.destroy_process_group()


def test_a_projected_step_still_ends_at_the_anchor():
    model, optimizer = start(elastic=3.0, refresh=NEVER)
    random = np.random.default_rng(0)
    for _ in range(5):
        step(model, optimizer, random.normal(size=N))
        assert optimizer.safety.subspace.coordinates(model.weights).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"elastic": 0.0}, {"curvature": "random"}])
def test_it_is_left_out(options, caplog):
    caplog.set_level("INFO", logger="safeopt")
    model, optimizer = start(**{"elastic": 2.0, **options, "mode": "none"})
    origin, drive = parameters(model), np.linspace(-1, 1, N)
    step(model, optimizer, drive)
    asked = optimizer.safety.config.elastic > 0
    assert caplog.text.count('elastic=2: with curvature="random" nothing is pulled back') == asked
    assert optimizer.safety.pull is None
    assert np.allclose(parameters(model), origin - 0.05 * drive, rtol=1e-12)


@pytest.mark.parametrize("basis", ["dense", "int8", "factored", "compressed"])
def test_bases_that_save_memory_go_without_and_say_so_once(basis, caplog):
    caplog.set_level("INFO", logger="safeopt")
    options = {"basis": basis, "elastic": 1.0, "refresh": RefreshPolicy.fixed(1)}
    model, optimizer = build("ProjectedAdamW", **options)
    run(model, optimizer, 2)
    pulled = basis in ("dense", "int8")
    said = f'elastic=1: with a basis that is stored as "{basis}" nothing is pulled back'
    assert (optimizer.safety.pull is not None) == pulled
    assert caplog.text.count(said) == (not pulled)
    optimizer.load_state_dict(optimizer.state_dict())
    assert caplog.text.count(said) == (not pulled)
    _, resumed = build("ProjectedAdamW", **options)
    resumed.load_state_dict(optimizer.state_dict())
    assert caplog.text.count(said) == 2 * (not pulled)


def test_a_state_carries_it_and_continues_bit_for_bit():
    random = np.random.default_rng(1)
    gradients = random.normal(size=(6, N))
    policy = RefreshPolicy(first=2, growth=1, every=2, drift=None)
    model, optimizer = start(elastic=2.0, refresh=policy)
    for gradient in gradients[:3]:
        step(model, optimizer, gradient)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = start(elastic=2.0, refresh=policy)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for gradient in gradients[3:]:
        step(model, optimizer, gradient)
        step(other, resumed, gradient)
        assert np.array_equal(parameters(model), parameters(other))
    assert resumed.safety.pull.trace == optimizer.safety.pull.trace


@pytest.mark.parametrize(("saved", "now"), [(0.0, 2.0), (2.0, 0.0)])
def test_a_state_without_it_is_refused_where_it_is_needed(saved, now):
    """The aligned parameters are not known any more; to leave the pull out is free."""
    model, optimizer = start(elastic=saved)
    step(model, optimizer, np.ones(N))
    _, resumed = start(elastic=now)
    if now:
        with pytest.raises(ValueError, match="elastic=0"):
            resumed.load_state_dict(optimizer.state_dict())
        assert resumed.safety.subspace is None
        return
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.safety.pull is None


@pytest.mark.parametrize("entry", ["shape", "negative", "nan", "missing"])
def test_a_state_that_was_tampered_with_is_refused(entry):
    model, optimizer = start(elastic=2.0)
    step(model, optimizer, np.ones(N))
    state = copy.deepcopy(optimizer.state_dict())
    pull = state["safety"]["pull"]
    if entry == "shape":
        pull["blocks"][0] = pull["blocks"][0][:, :2]
    elif entry == "negative":
        pull["blocks"][0][1] = -1
    elif entry == "nan":
        pull["blocks"][0][0] = torch.nan
    else:
        del pull["trace"]
    _, other = start(elastic=2.0)
    with pytest.raises(ValueError, match=r'\["pull"\]'):
        other.load_state_dict(state)


def test_a_failed_refresh_leaves_it_as_it_was(monkeypatch):
    policy = RefreshPolicy(first=2, growth=1, every=2, drift=None)
    model, optimizer = start(elastic=2.0, refresh=policy)
    step(model, optimizer, np.ones(N))
    before = optimizer.safety.pull
    with monkeypatch.context() as patch:
        patch.setattr(SafetyProbe, "_run", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, optimizer, np.ones(N))
    assert optimizer.safety.pull is before
    step(model, optimizer, np.ones(N))
    assert optimizer.safety.pull is not before


def test_parameters_that_are_not_finite_are_left_as_they_are():
    model, optimizer = start(elastic=2.0)
    step(model, optimizer, np.ones(N))
    with torch.no_grad():
        model.weights[0][0, 0] = torch.inf
    expected = parameters(model) - 0.05 * np.ones(N)
    with pytest.raises(FloatingPointError, match="parameters are not finite"):
        step(model, optimizer, np.ones(N))
    assert np.array_equal(parameters(model), expected)
