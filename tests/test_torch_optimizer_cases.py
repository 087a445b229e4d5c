"""PyTorch's own optimizer cases, run against ours.

``torch.testing._internal.common_optimizers`` lists, for every torch optimizer, valid constructor
inputs, erroneous ones with their errors, schedulers and supported implementations; torch's test
suite runs over that table. Here ProjectedAdamW and SafetySAM take AdamW's line, PreconditionedSGD
takes SGD's, and `safeguard` goes around every one. What does not fit stands in `SKIPPED`.
"""

from __future__ import annotations

import copy
import io
import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from optimizer_table import NEVER, copies, equal
from quadratic import Quadratic, orthogonal, probe_of
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from safeopt import PreconditionedSGD, ProjectedAdamW, RefreshPolicy, SafetySAM, safeguard

INFOS = {info.optim_cls.__name__: info for info in optim_db}
SHAPES = ((4, 3), (3, 2), (2, 2))  # matrices, since Muon takes no others
SAFETY = {"trial_examples": 1, "rank": 2, "restore_alignment": False}
OURS = {
    "ProjectedAdamW": ("AdamW", ProjectedAdamW),
    "SafetySAM": ("AdamW", lambda params, **options: SafetySAM(params, **{"rho": 0.0, **options})),
    "PreconditionedSGD": ("SGD", PreconditionedSGD),
}
REFUSED = {
    "LBFGS": "its curvature pairs assume that nothing else moves the parameters",
    "SparseAdam": "sparse gradients cannot be protected",
}
GUARDED = [name for name in INFOS if name not in REFUSED]
# (ours, description of torch's case): why it is not run as it is there.
SKIPPED = {
    ("PreconditionedSGD", "fused"): "the direction is needed before the parameters move",
    ("PreconditionedSGD", "non-zero weight_decay"): "decoupled; see the test of weight decay",
    ("PreconditionedSGD", "maximize"): "decoupled weight decay; see the test of weight decay",
    ("PreconditionedSGD", "weight_decay w/ momentum"): "decoupled; see the test of weight decay",
    ("PreconditionedSGD", "nesterov"): "decoupled weight decay; see the test of weight decay",
}


def problem(seed=0, dtype=torch.float32):
    """Twelve and some parameters, six safety examples in a plane, and gradients that are reset."""
    n = sum(torch.Size(shape).numel() for shape in SHAPES)
    model = Quadratic(torch.eye(n), torch.linspace(-1, 1, n), SHAPES, dtype=dtype, seed=seed)
    mix = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).double()
    return model, probe_of(model, mix @ orthogonal(n, seed)[:2])


def kwargs_of(case):
    """The case's arguments; tensors are the test's own."""
    return copy.deepcopy(case.kwargs)


def inputs(names, device="cpu"):
    return list(_inputs(names, device))


def _inputs(names, device):
    for name in names:
        torch_name = OURS[name][0] if name in OURS else name
        for case in INFOS[torch_name].optim_inputs_func(device=device, dtype=torch.float32):
            yield pytest.param(name, case, id=f"{name}-{case.desc}")


def protected(name, params, probe, options, **safety):
    """Ours, or torch's under `safeguard`."""
    safety = {"refresh": NEVER, **SAFETY, **safety}
    if name in OURS:
        if name == "SafetySAM" and "mode" in safety:
            safety["protection"] = safety.pop("mode")
        return OURS[name][1](params, probe=probe, **safety, **options)
    return safeguard(INFOS[name].optim_cls(params, **options), probe, **safety)


def torch_class(name):
    return INFOS[OURS[name][0] if name in OURS else name].optim_cls


def train(model, optimizer, steps):
    for _ in range(steps):
        model.closure(optimizer)
        optimizer.step()


def inside(optimizer):
    """The largest coordinate of the parameters in the safety subspace."""
    subspace = optimizer.safety.subspace
    return float(subspace.coordinates(optimizer.safety.probe.model.weights).abs().max())


@pytest.mark.parametrize(("name", "case"), inputs([*OURS, *GUARDED]))
def test_valid_inputs(name, case):
    """Without protection each is torch's optimizer bit for bit; with it, nothing moves inside U."""
    model, probe = problem()
    optimizer = protected(name, model.weights, probe, kwargs_of(case), mode="project")
    before = copies(model.weights)
    train(model, optimizer, 3)
    assert inside(optimizer) < 2e-6
    assert not equal(model.weights, before)
    if reason := SKIPPED.get((name, case.desc)):
        pytest.skip(reason)
    model, probe = problem()
    train(model, protected(name, model.weights, probe, kwargs_of(case), damping=0), 3)
    twin, _ = problem()
    train(twin, torch_class(name)(twin.weights, **kwargs_of(case)), 3)
    assert equal(model.weights, twin.weights)


@pytest.mark.parametrize(("name", "case"), inputs(["PreconditionedSGD"]))
def test_decoupled_weight_decay(name, case):
    """torch's SGD on parameters that were multiplied with 1 − lr·weight_decay just before."""
    options = kwargs_of(case)
    decay = options.get("weight_decay", 0)
    model, probe = problem()
    optimizer = protected(name, model.weights, probe, options, damping=0)
    train(model, optimizer, 3)
    twin, _ = problem()
    plain = torch.optim.SGD(twin.weights, **{**kwargs_of(case), "weight_decay": 0})
    for _ in range(3):
        twin.closure(plain)
        with torch.no_grad():
            for p in twin.weights:
                p.mul_(1 - float(plain.param_groups[0]["lr"]) * decay)
        plain.step()
    assert equal(model.weights, twin.weights)


def errors():
    for name in OURS:
        info = INFOS[OURS[name][0]]
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            yield pytest.param(name, case, id=f"{name}-{case.optimizer_error_input.desc}")


@pytest.mark.parametrize(("name", "case"), list(errors()))
def test_erroneous_inputs(name, case):
    """The same errors, with the same words, at the same place."""
    given = case.optimizer_error_input
    model, probe = problem()
    params = list(model.weights) if given.params is None else given.params
    at_construction = case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if case.error_type is UserWarning:
        with pytest.warns(UserWarning, match=case.error_regex):
            OURS[name][1](params, probe=probe, refresh=NEVER, **SAFETY, **kwargs_of(given))
        return
    expected = pytest.raises(case.error_type, match=case.error_regex)
    with expected if at_construction else nullcontext():
        optimizer = OURS[name][1](params, probe=probe, refresh=NEVER, **SAFETY, **kwargs_of(given))
    if not at_construction:
        model.closure(optimizer)
        with pytest.raises(case.error_type, match=case.error_regex):
            optimizer.step()


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_be_protected_are_refused(name):
    model, probe = problem()
    with pytest.raises(TypeError, match=f"optimizer={name}: {REFUSED[name]}"):
        safeguard(INFOS[name].optim_cls(model.weights), probe)


def capturable():
    names = [*OURS, *GUARDED]
    for case in inputs(names, device="cuda"):  # capturable inputs are listed for a GPU only
        if case.values[1].kwargs.get("capturable"):
            yield case


@pytest.mark.parametrize(("name", "case"), list(capturable()))
def test_capturable_inputs_are_refused(name, case):
    """A protected step reads numbers on the host; the error says so before anything is changed."""
    model, probe = problem()
    with pytest.raises(ValueError, match="capturable=True: "):
        protected(name, model.weights, probe, kwargs_of(case))


IMPLEMENTATIONS = [
    pytest.param(name, flag, case, id=f"{name}-{flag}-{case.desc}")
    for name in [*OURS, *GUARDED]
    for flag in ("foreach", "fused", "differentiable")
    for case in INFOS[OURS[name][0] if name in OURS else name].optim_inputs_func(device="cpu")
    if flag in INFOS[OURS[name][0] if name in OURS else name].supported_impls
    and not (flag == "fused" and "cpu" not in INFOS[torch_class(name).__name__].supports_fused_on)
]


@pytest.mark.parametrize(("name", "flag", "case"), IMPLEMENTATIONS)
def test_implementations_agree_with_the_loop(name, flag, case):
    """foreach and fused equal the single-tensor loop; differentiable is refused."""
    if reason := SKIPPED.get((name, flag)):
        model, probe = problem()
        with pytest.raises(ValueError, match=f"{flag}=True"):
            protected(name, model.weights, probe, {flag: True})
        pytest.skip(reason)
    options = kwargs_of(case)
    if flag == "differentiable":
        model, probe = problem()
        with pytest.raises(ValueError, match="differentiable=True: "):
            protected(name, model.weights, probe, {**options, flag: True})
        return
    if isinstance(options.get("lr"), torch.Tensor) and torch_class(name) is not torch.optim.SGD:
        options["lr"] = float(options["lr"])  # torch refuses it with foreach, as tested above
    ends = []
    for chosen in (True, False):
        model, probe = problem(dtype=torch.float64)
        setting = {flag: chosen} if flag == "foreach" or chosen else {"foreach": False}
        optimizer = protected(
            name, model.weights, probe, {**options, **setting}, refresh=RefreshPolicy.fixed(2)
        )
        train(model, optimizer, 4)
        ends.append(model.x.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-9 * ends[1].abs().max()


@pytest.mark.parametrize("name", [*OURS, *GUARDED])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_schedulers(name):
    """The table's schedulers, chained as torch chains them: the rates are torch's own."""
    for makers in INFOS[torch_class(name).__name__].scheduler_inputs:
        model, probe = problem()
        twin, _ = problem()
        options = {"lr": 0.01}
        optimizer = protected(name, model.weights, probe, options)
        plain = torch_class(name)(twin.weights, **options)
        pairs = [(make(optimizer), make(plain)) for make in makers]
        for _ in range(6):
            train(model, optimizer, 1)
            train(twin, plain, 1)
            for pair in pairs:
                for scheduler in pair:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([1.0] if plateau else []))
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert inside(optimizer) < 2e-6 or name == "PreconditionedSGD"


@pytest.mark.parametrize("name", [*OURS, *GUARDED])
def test_steps_without_gradients_or_with_zero_gradients_are_torchs_own(name):
    """No operation but for what torch's does itself (ASGD decays the parameters a little)."""
    model, probe = problem()
    twin, _ = problem()
    options = {} if name == "Adafactor" else {"weight_decay": 0}
    options = {} if name == "Rprop" else options
    optimizer = protected(name, model.weights, probe, options, mode="project")
    plain = torch_class(name)(twin.weights, **options)
    before, state = copies(model.weights), len(optimizer.state)
    optimizer.step()
    assert equal(model.weights, before)
    assert len(optimizer.state) == state
    assert optimizer.safety.step_count == 0
    assert probe.passes.forward == 0
    for one in (model, twin):
        for p in one.weights:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    plain.step()
    assert equal(model.weights, before) == equal(twin.weights, before) == (name != "ASGD")
    assert optimizer.safety.step_count == 1


@pytest.mark.parametrize(("name", "case"), inputs([*OURS, *GUARDED]))
def test_states_and_copies_go_on_alike(name, case):
    """Through a file with weights_only, and by deepcopy; all public attributes are copied."""
    policy = RefreshPolicy.fixed(2)
    model, probe = problem()
    optimizer = protected(name, model.weights, probe, kwargs_of(case), refresh=policy)
    train(model, optimizer, 3)
    copied, other = copy.deepcopy((model, optimizer))
    assert public(other) == public(optimizer)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    loaded, its_probe = problem(seed=1)
    loaded.start = model.start
    fresh = protected(name, loaded.weights, its_probe, kwargs_of(case), refresh=policy)
    # The safety examples are part of the model here: those of the saved run are taken.
    its_probe.loss = lambda module, batch: probe.loss(module, batch)
    loaded.load_state_dict(weights)
    fresh.load_state_dict(state)
    for one, its in ((model, optimizer), (copied, other), (loaded, fresh)):
        train(one, its, 3)
    assert equal(model.weights, copied.weights)
    assert equal(model.weights, loaded.weights)
    assert other.safety.counters() == optimizer.safety.counters() == fresh.safety.counters()


def public(obj):
    return {name for name in dir(obj) if not name.startswith("_")}


@pytest.mark.parametrize("name", [*OURS, *GUARDED])
def test_it_prints_and_keeps_its_defaults(name):
    model, probe = problem()
    optimizer = protected(name, model.weights, probe, {"lr": 0.123})
    assert re.search(r"lr: 0.123", repr(optimizer))
    assert optimizer.defaults["lr"] == 0.123
    twin, _ = problem()
    plain = torch_class(name)(twin.weights, lr=0.123)
    missing = set(plain.param_groups[0]) - set(optimizer.param_groups[0])
    assert not missing


@pytest.mark.parametrize("name", [*OURS, *GUARDED])
def test_groups_have_their_own_options(name):
    """A group with lr=0 stays where it is; without protection a group moves as torch's does."""
    model, probe = problem()
    twin, _ = problem()
    ends = []
    for one in (model, twin):
        first, *rest = one.weights
        groups = [{"params": [first], "lr": 0.0, "protect": False}, {"params": rest}]
        optimizer = (
            protected(name, groups, probe, {"lr": 0.01}, mode="none")
            if one is model
            else torch_class(name)(groups, lr=0.01)
        )
        before = copies(one.weights)
        train(one, optimizer, 2)
        ends.append((copies([first]), copies(rest)))
        assert equal([first], before[:1]) == (name != "Rprop")  # its steps have a least size
        assert not equal(rest, before[1:])
    assert equal(*(first for first, _ in ends))
    if name != "PreconditionedSGD":  # its direction is another
        assert equal(*(rest for _, rest in ends))


def test_the_skip_list_names_cases_that_exist():
    known = {(c.values[0], c.values[1].desc) for c in inputs(OURS)}
    known |= set(itertools.product(OURS, ("foreach", "fused")))
    assert set(SKIPPED) <= known
    assert all(len(reason) > 10 for reason in SKIPPED.values())
