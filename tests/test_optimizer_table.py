"""What a user of torch.optim expects of every optimizer of the table."""

import copy
import io
import math
import pickle
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_table import (
    NEVER,
    OPTIMIZERS,
    build,
    copies,
    equal,
    names,
    probe_of,
    run,
)
from quadratic import Quadratic, orthogonal
from quadratic import probe_of as quadratic_probe
from tiny_models import VOCAB, task_step, tiny_llama, trainable
from tolerances import COORDINATE
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyConfig, safeguard

EVERY = RefreshPolicy.fixed(2)
CASES = [(name, case) for name, line in OPTIMIZERS.items() for case in line.inputs]


def push(params, step):
    """Random gradients, the same for all models."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def coordinates(optimizer):
    """c of the parameters as they are."""
    params = [
        p
        for group in optimizer.param_groups
        if group.get("protect", True)
        for p in group["params"]
        if p.requires_grad
    ]
    return optimizer.safety.subspace.coordinates(params)


# Construction


@pytest.mark.parametrize(("name", "options"), CASES)
def test_options_reach_the_base_optimizer(name, options):
    """Without protection every input is the base optimizer's, bit for bit; with it, it protects."""
    model, optimizer = build(name, damping=0, **options)
    plain = tiny_llama(layers=1)
    base = OPTIMIZERS[name].plain(trainable(plain), 1e-2, **options)
    run(model, optimizer, 4)
    run(plain, base, 4)
    assert equal(model.parameters(), plain.parameters())
    model, optimizer = build(name, mode="project", refresh=NEVER, **options)
    run(model, optimizer, 4)
    assert coordinates(optimizer).abs().max() < 1e-5
    assert not equal(model.parameters(), plain.parameters())


@pytest.mark.parametrize("name", [n for n, case in CASES if case.get("foreach")])
@pytest.mark.parametrize("maximize", [False, True])
def test_foreach_and_single_tensor_agree(name, maximize):
    (model, one), (twin, many) = (
        build(name, mode="project", refresh=EVERY, foreach=foreach, maximize=maximize)
        for foreach in (False, True)
    )
    losses, others = run(model, one, 6), run(twin, many, 6)
    assert losses == pytest.approx(others, rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    assert [e.step for e in one.safety.history] == [e.step for e in many.safety.history]


# A wrong value of any one safety argument: every value of a row is refused by its argument's name.
WRONG = {
    "rank": (0, -1, 2.5, None, "x", True, math.nan),
    "mode": ("hard", None, 1),
    "damping": (-1, math.nan, math.inf, None, "x", [1]),
    "budget": (-0.1, math.nan, None, "x"),
    "refresh": (10, "often", 0.5),
    "examples": (0, 1.5, None, True),
    "window": (0, 1, None, 8.0),
    "newton_damping": (0.0, -1, math.nan, math.inf, None, "x"),
    "trial_examples": (0, 10, None, 2.5),
    "curvature": ("hessian", None, 0),
    "basis": ("sparse", None, 8),
    "elastic": (-1, math.nan, math.inf, None, "x"),
    "seed": ("a", None, 0.5),
    "probe": (None, "prompts"),
}


@names
@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments_name_themselves(name, argument):
    model = tiny_llama(layers=1)
    shown = {"mode": "(mode|protection)", "probe": "probe"}.get(argument, argument)
    for value in WRONG[argument]:
        with pytest.raises((ValueError, TypeError), match=f"^{shown}[=:]"):
            build(name, model=model, **{argument: value})


def test_the_table_of_wrong_arguments_is_complete():
    flags = {"restore_alignment"}  # taken by its truth
    assert set(WRONG) - {"probe"} == {field.name for field in fields(SafetyConfig)} - flags


@names
def test_own_wrong_arguments_name_themselves(name):
    policy = ({"on_refresh_error": "stop"}, ValueError, 'on_refresh_error="stop": expected one of')
    case = OPTIMIZERS[name]
    for options, error, message in (*case.wrong, policy):
        with pytest.raises(error, match=message):
            build(name, **options)


# Parameters


@names
def test_groups_can_be_added_before_the_first_step(name):
    model, optimizer = build(name, params=trainable(tiny_llama(layers=1))[:2])
    model = tiny_llama(layers=1)
    first, second, third, *rest = trainable(model)
    _, optimizer = build(name, model=model, params=[first], refresh=NEVER)
    optimizer.add_param_group({"params": [second], "lr": 3e-3})
    optimizer.add_param_group({"params": third, "protect": False})
    before = copies([*rest, third])
    run(model, optimizer, 2)
    assert len(optimizer.param_groups) == 3
    basis = optimizer.safety.subspace.basis
    assert basis.coordinates([first, second]).shape == (basis.rank,)
    assert equal(rest, before[:-1])
    assert not torch.equal(third, before[-1])
    optimizer.add_param_group({"params": rest, "protect": False})
    run(model, optimizer, 2, start=2)
    assert not equal(rest, before[:-1])
    assert coordinates(optimizer).abs().max() < 1e-5 or name == "PreconditionedSGD"
    assert optimizer.safety.step_count == 4


@names
@pytest.mark.parametrize("steps", [0, 3])
def test_other_protected_parameters_are_refused_after_the_first_estimate(name, steps):
    """What the aligned model's loss does along them is not known; nothing changes."""
    changes = {
        "added": lambda optimizer, free: optimizer.add_param_group({"params": free}),
        "frozen": lambda optimizer, free: optimizer.param_groups[0]["params"][0].requires_grad_(
            False
        ),
        "exchanged": lambda optimizer, free: optimizer.param_groups[0]["params"].__setitem__(
            1, nn.Parameter(optimizer.param_groups[0]["params"][1].detach().clone())
        ),
        "resized": lambda optimizer, free: model.resize_token_embeddings(VOCAB + 2),
    }
    message = r"params: (\d protected parameters were added and|a protected parameter of shape)"
    for change in changes.values():
        model = tiny_llama(layers=1)
        *chosen, free = trainable(model)
        _, optimizer = build(name, model=model, params=chosen, refresh=EVERY)
        run(model, optimizer, steps)
        optimizer.restore()
        change(optimizer, free)
        before, state = copies(model.parameters()), optimizer.safety.counters()
        push(optimizer.param_groups[0]["params"], 3)
        for call in (optimizer.step, optimizer.restore):
            with pytest.raises(ValueError, match=message):
                call()
        assert equal(model.parameters(), before)
        assert optimizer.safety.counters() == state


@names
def test_complex_and_sparse_are_refused(name):
    for bad in (torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        model = tiny_llama(layers=1)
        with pytest.raises(TypeError, match="complex and sparse parameters cannot be protected"):
            build(name, model=model, params=[*trainable(model), nn.Parameter(bad)])
    model, optimizer = build(name)
    task_step(model, 0)
    first = trainable(model)[0]
    first.grad = first.grad.to_sparse()
    before = copies(model.parameters())
    with pytest.raises(TypeError, match="sparse gradients"):
        optimizer.step()
    assert equal(model.parameters(), before)


@names
def test_capturable_and_differentiable_groups_are_refused(name):
    model, optimizer = build(name, refresh=NEVER)
    for option in ("capturable", "differentiable"):
        task_step(model, 0)
        optimizer.param_groups[0][option] = True
        with pytest.raises(ValueError, match=f"{option}=True: a protected step"):
            optimizer.step()
        optimizer.param_groups[0][option] = False
    run(model, optimizer, 1)


def test_an_optimizer_that_is_refused_does_not_look_protected():
    model = tiny_llama(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    with pytest.raises(ValueError, match="capturable=True"):
        safeguard(optimizer, probe_of(model))
    assert not hasattr(optimizer, "safety")
    optimizer.param_groups[0]["capturable"] = False
    assert safeguard(optimizer, probe_of(model)).safety.active


@names
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_named_twice_is_stepped_back_once(name):
    """As of tied weights."""
    model = tiny_llama(layers=1)
    first, *others = trainable(model)
    options = {"refresh": EVERY, "restore_alignment": False, "mode": "project"}
    model, optimizer = build(name, model=model, params=[first, *others, first], **options)
    for step in range(4):
        task_step(model, step)
        optimizer.step()
        assert len(optimizer.safety.subspace.basis.blocks) == 1 + len(others)
        assert coordinates(optimizer).abs().max() < 1e-5


@names
def test_a_step_under_autocast_keeps_its_precision(name):
    """The basis and Uᵀθ − Uᵀθ_r have the 24 bits of float32, not the 8 of bfloat16."""
    model, optimizer = build(name, refresh=EVERY, restore_alignment=False, mode="project")
    for step in range(4):
        task_step(model, step)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        assert all(b.dtype == torch.float32 for b in optimizer.safety.subspace.basis.blocks)
        assert coordinates(optimizer).abs().max() < 1e-5


@st.composite
def layouts(draw):
    """Shapes, and a group for each with its learning rate and whether it is protected."""
    shape = st.lists(st.integers(1, 3), max_size=3)
    shapes = draw(st.lists(shape, min_size=1, max_size=5))
    group = st.tuples(st.sampled_from([1e-3, 1e-2, 0.1]), st.booleans())
    groups = draw(st.lists(group, min_size=1, max_size=3))
    if not any(protect for _, protect in groups):
        groups[0] = (groups[0][0], True)
    places = [0, *(draw(st.integers(0, len(groups) - 1)) for _ in shapes[1:])]
    protected = next(i for i, (_, protect) in enumerate(groups) if protect)
    return shapes, groups, [protected, *places[1:]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    layouts(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_any_layout_of_groups(layout, dtype, name, rank, seed):
    """Uᵀ(θ − θ_r) = 0, groups without protection move as ever, in any order of the parameters."""
    shapes, kinds, places = layout
    size = sum(torch.Size(shape).numel() for shape in shapes)
    ends = []
    for turned in (False, True):
        models = [
            Quadratic(torch.eye(size), torch.zeros(size), shapes, dtype=dtype, seed=seed)
            for _ in range(2)
        ]
        directions = orthogonal(size, seed)[: min(rank, size)].repeat(6, 1)[:6]
        probe = quadratic_probe(models[0], directions * torch.arange(1.0, 7).view(-1, 1))
        groups = []
        for model in models:
            members = [
                {"params": [], "lr": rate, **({} if protect else {"protect": False})}
                for rate, protect in kinds
            ]
            for p, place in zip(model.weights, places, strict=True):
                members[place]["params"].append(p)
            members = [group for group in members if group["params"]]
            for group in members if turned else ():
                group["params"].reverse()
            groups.append(members[::-1] if turned else members)
        case = OPTIMIZERS[name]
        options = {"probe": probe, "mode": "project", "refresh": EVERY, "restore_alignment": False}
        optimizer = case.protected(groups[0], 1e-2, options | {"trial_examples": 1, "rank": rank})
        base = case.plain(groups[1], 1e-2)
        for step in range(3):
            for model in models:
                push(model.weights, seed + step)
            optimizer.step()
            base.step()
        span = float(models[0].x.detach().abs().double().sum())
        limit = 10 * COORDINATE.get(dtype, 1e-2) * span
        assert coordinates(optimizer).abs().max() < limit if optimizer.safety.subspace.rank else 1
        for p, q, place in zip(models[0].weights, models[1].weights, places, strict=True):
            assert kinds[place][1] or torch.equal(p, q)
        ends.append(models[0].x.detach().double())
    assert (ends[0] - ends[1]).abs().max() < {torch.bfloat16: 0.2}.get(dtype, 1e-3)


# Steps


def scheduled(optimizer):
    """Every scheduler of torch.optim.lr_scheduler."""
    halves = [schedules.ConstantLR(optimizer, 0.5), schedules.LinearLR(optimizer, 0.1)]
    yield schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    yield schedules.MultiplicativeLR(optimizer, lambda step: 0.9)
    yield schedules.StepLR(optimizer, 2)
    yield schedules.MultiStepLR(optimizer, [1, 3])
    yield schedules.ConstantLR(optimizer)
    yield schedules.LinearLR(optimizer)
    yield schedules.ExponentialLR(optimizer, 0.5)
    yield schedules.PolynomialLR(optimizer, 3)
    yield schedules.CosineAnnealingLR(optimizer, 3)
    yield schedules.CosineAnnealingWarmRestarts(optimizer, 2)
    yield schedules.CyclicLR(optimizer, 1e-3, 1e-2, 2, cycle_momentum=False)
    yield schedules.OneCycleLR(optimizer, 1e-2, total_steps=8)
    yield schedules.ReduceLROnPlateau(optimizer, patience=0)
    yield schedules.SequentialLR(optimizer, halves, [2])
    yield schedules.ChainedScheduler(halves, optimizer)


@names
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_every_scheduler(name):
    """Same learning rates as without protection, and steps of rate 0 do not count."""
    count = sum(1 for _ in scheduled(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)))
    known = {value for value in vars(schedules).values() if isinstance(value, type)}
    known = {kind for kind in known if issubclass(kind, schedules.LRScheduler)}
    assert count >= len(known - {schedules.LRScheduler, schedules._LRScheduler}) - 1
    probe, model = None, tiny_llama(layers=1)
    for index in range(count):
        probe = probe or probe_of(model)
        _, optimizer = build(name, model=model, probe=probe, refresh=NEVER, params=chosen(model))
        base = OPTIMIZERS[name].plain(chosen(tiny_llama(layers=1)), 1e-2)
        rates, moving = [], 0
        pair = [
            next(s for i, s in enumerate(scheduled(o)) if i == index) for o in (optimizer, base)
        ]
        for step in range(4):
            for one, scheduler in zip((optimizer, base), pair, strict=True):
                push(one.param_groups[0]["params"], step)
                rates.append([float(group["lr"]) for group in one.param_groups])
                one.step()
                scheduler.step(*([1.0] if index == 12 else []))
            moving += rates[-1][0] > 0
        assert rates[::2] == rates[1::2]
        assert optimizer.safety.step_count == moving


def chosen(model):
    return trainable(model)[:2]


@names
def test_learning_rates_may_be_tensors(name):
    model, optimizer = (
        build(name, lr=torch.tensor(1e-2), refresh=EVERY, foreach=False)
        if (name == "ProjectedAdamW")
        else build(name, lr=torch.tensor(1e-2), refresh=EVERY)
    )
    plain, reference = build(name, refresh=EVERY)
    assert run(model, optimizer, 3) == pytest.approx(run(plain, reference, 3), rel=1e-5)
    assert optimizer.safety.step_count == 3
    optimizer.param_groups[0]["lr"].fill_(0.0)
    run(model, optimizer, 1)
    assert optimizer.safety.step_count == 3
    assert optimizer.safety.coupling == pytest.approx(reference.safety.coupling or 0, rel=1e-2)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_fused_step_under_a_gradient_scaler(unscaled):
    """It decides itself whether it is skipped, and sees scaled gradients."""
    model, optimizer = build("ProjectedAdamW", fused=True, refresh=EVERY)
    plain, reference = build("ProjectedAdamW", fused=True, refresh=EVERY)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for step in range(4):
        task_step(model, step)
        for p in trainable(model):
            p.grad *= math.inf if step == 1 else scaler.get_scale()
        scaler.scale(torch.ones(()))
        before = copies(model.parameters())
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert equal(model.parameters(), before) == (step == 1)
        if step != 1:
            run(plain, reference, 1, start=step)
    assert optimizer.safety.step_count == 3
    assert [e.step for e in optimizer.safety.history] == [0, 2]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@names
def test_accumulated_and_clipped_gradients(name):
    """Two backward passes on half a batch, clipped, are one on the whole: one step each."""
    ends = []
    for parts in (1, 2):
        model, optimizer = build(name, refresh=EVERY)
        for step in range(4):
            ids = torch.randint(4, VOCAB, (4, 8), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            for part in ids.chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert norm > 0.5
            optimizer.step()
        assert optimizer.safety.step_count == 4
        assert [e.step for e in optimizer.safety.history] == [0, 2, 4]
        ends.append(copies(model.parameters()))
    for p, q in zip(*ends, strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


@names
def test_clearing_gradients(name):
    model, optimizer = build(name, refresh=NEVER)
    run(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in trainable(model))
    optimizer.step()  # momentum moves the parameters: it is a step
    assert optimizer.safety.step_count == 3
    optimizer.zero_grad()
    assert all(p.grad is None for p in trainable(model))
    before = copies(model.parameters())
    optimizer.step()
    assert equal(model.parameters(), before)
    assert optimizer.safety.step_count == 3


@pytest.mark.parametrize("base", [ProjectedAdamW, SGD])
def test_a_subclass_that_calls_its_parents_step_takes_one_step(base):
    """torch runs an optimizer's hooks around both of them."""

    class Clipping(base):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1e6)
            return super().step(closure)

    def train(cls):
        model = tiny_llama(layers=1)
        probe = probe_of(model)
        own = {"probe": probe, "rank": 8} if base is ProjectedAdamW else {}
        optimizer = cls(trainable(model), lr=1e-2, **own)
        if not own:
            safeguard(optimizer, probe, rank=8)
        run(model, optimizer, 5)
        return model, optimizer.safety

    model, safety = train(base)  # the parent's own step has its hooks from now on
    twin, own = train(Clipping)
    assert own.step_count == 5
    assert own.history == safety.history
    assert own.coupling == safety.coupling > 0
    assert equal(model.parameters(), twin.parameters())


@names
def test_hooks_of_the_user_run_around_the_protected_step(name):
    model, optimizer = build(name, mode="project", refresh=NEVER)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(
        lambda one, *args: seen.append(float(coordinates(optimizer).abs().max()))
    )
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "note": 1})
    run(model, optimizer, 2)
    assert seen[::2] == ["before"] * 2
    assert max(seen[1::2]) < 1e-5
    state = optimizer.state_dict()
    assert state["note"] == 1
    assert "safety" in state
    loaded = []
    optimizer.register_load_state_dict_pre_hook(lambda one, given: loaded.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda one: loaded.append("after"))
    optimizer.load_state_dict(state)
    assert loaded == ["before", "after"]


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_a_hook_that_takes_the_schedulers_step_does_not_change_the_rate_of_the_one_before(elastic):
    """One that was there before `safeguard`'s own runs before it."""
    model = tiny_llama(layers=1)
    base = torch.optim.SGD(trainable(model), lr=1e-2)
    scheduler = schedules.LambdaLR(base, lambda step: 1.0 if step < 2 else 0.0)
    base.register_step_post_hook(lambda *args: scheduler.step())
    optimizer = safeguard(base, probe_of(model), rank=8, refresh=NEVER, elastic=elastic)
    run(model, optimizer, 3)
    assert optimizer.safety.step_count == 2
    assert optimizer.safety.last_rate == 1e-2
    assert optimizer.safety.counters()["travelled"] == 2e-2


@names
def test_the_order_of_groups_may_change(name):
    ends = []
    for turned in (False, True):
        model = tiny_llama(layers=1)
        groups = [{"params": [p]} for p in trainable(model)]
        _, optimizer = build(name, model=model, params=groups, refresh=EVERY)
        run(model, optimizer, 3)
        if turned:
            optimizer.param_groups.reverse()
        run(model, optimizer, 3, start=3)
        optimizer.restore()
        ends.append(copies(model.parameters()))
    assert equal(*ends)


@pytest.mark.parametrize("closure", [False, True])
def test_a_hook_that_clears_the_gradients_does_not_end_the_protection(closure):
    """One that was there before `safeguard`'s own runs before it."""
    model = tiny_llama(layers=1)
    base = torch.optim.SGD(trainable(model), lr=1e-2)
    base.register_step_post_hook(lambda one, *args: one.zero_grad())
    optimizer = safeguard(base, probe_of(model), rank=8, refresh=EVERY)
    for step in range(3):
        if closure:
            optimizer.step(lambda step=step: task_step(model, step))
        else:
            task_step(model, step)
            optimizer.step()
    assert optimizer.safety.step_count == 3
    assert optimizer.safety.last_refresh == 2
    assert coordinates(optimizer).abs().max() < 1e-5
    assert optimizer.safety.coupling is None


@names
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(name, closure, value):
    """Refused before anything has changed, or a step of the base optimizer alone."""
    for policy in ("raise", "warn"):
        model, optimizer = build(name, refresh=EVERY, on_refresh_error=policy)
        run(model, optimizer, 1)
        state = copy.deepcopy(optimizer.state_dict())
        before, counters = copies(model.parameters()), optimizer.safety.counters()
        passes = copy.copy(optimizer.safety.passes)

        def evaluate(model=model):
            loss = task_step(model, 1)
            trainable(model)[-1].grad.view(-1)[0] = value
            return loss

        arguments = (evaluate,) if closure else ()
        if not closure:
            evaluate()
        if policy == "raise":
            with pytest.raises(FloatingPointError, match="the task gradient is not finite"):
                optimizer.step(*arguments)
            assert equal(model.parameters(), before)
            for key, entry in optimizer.state_dict()["state"].items():
                assert all(torch.equal(entry[k], state["state"][key][k]) for k in entry)
            run(model, optimizer, 1, start=1)
            assert optimizer.safety.last_refresh == 2
        else:
            with pytest.warns(RuntimeWarning, match="FloatingPointError: the task grad") as caught:
                optimizer.step(*arguments)
            assert len(caught) == 1
            assert not equal(model.parameters(), before)
            assert optimizer.safety.counters() == counters
            assert optimizer.safety.passes == passes


@names
def test_finite_gradients_whose_norm_overflows_are_no_error(name):
    model, optimizer = build(name, lr=1e-30, refresh=NEVER)
    task_step(model, 0)
    trainable(model)[0].grad.fill_(1e30)
    optimizer.step()
    assert optimizer.safety.step_count == 1


@names
def test_parameters_that_overflow_do_not_spread(name):
    """Mapped back, one number that is not finite would take all parameters with it."""
    model, optimizer = build(name, refresh=NEVER)
    run(model, optimizer, 1)
    first, *others = trainable(model)
    task_step(model, 1)
    with torch.no_grad():
        first.view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError, match="parameters are not finite"):
        optimizer.step()
    assert int((~first.isfinite()).sum()) == 1
    assert all(bool(p.isfinite().all()) for p in others)
    assert optimizer.safety.step_count == 1


@names
def test_a_state_after_coordinates_have_overflowed_can_be_loaded(name):
    model, optimizer = build(name, lr=1e-40, refresh=NEVER)
    run(model, optimizer, 1)
    basis = optimizer.safety.subspace.basis
    gradients = [3e38 * block[0].sign() for block in basis.blocks]
    assert not basis.coordinates(gradients).isfinite().all()
    for sign in (1, -1):  # twice the same would overflow in the momentum
        for p, gradient in zip(trainable(model), gradients, strict=True):
            p.grad = sign * gradient
        optimizer.step()
    assert optimizer.safety.step_count == 3
    assert optimizer.safety.coupling is None
    optimizer.load_state_dict(optimizer.state_dict())


@names
def test_restoring_in_inference_mode(name):
    model, optimizer = build(name, refresh=NEVER)
    run(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    with torch.inference_mode():
        measured = optimizer.restore()
    assert measured == other.restore()
    assert measured.step == 3
    assert run(model, optimizer, 2, start=3) == run(twin, other, 2, start=3)


def test_compiled_models_and_steps():
    """The model compiled, and ``step`` inside a compiled function: the hooks run outside of it."""
    plain, reference = build("safeguard(SGD)", refresh=EVERY)
    model, optimizer = build("safeguard(SGD)", refresh=EVERY)
    compiled = torch.compile(model, backend="eager")
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for index in range(3):
        loss = task_step(compiled, index)
        step()
        assert float(loss) == pytest.approx(run(plain, reference, 1, start=index)[0], rel=1e-5)
    assert [e.step for e in optimizer.safety.history] == [0, 2]
    assert optimizer.safety.step_count == 3
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


# Copies


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@names
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_of_model_and_optimizer_go_on_alike(name, copied):
    """Bit for bit, protected, and without the hooks and schedulers that torch drops as well."""
    model, optimizer = build(name, refresh=EVERY, held=True, budget=0.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # it replaces the instance's step
    optimizer.register_step_post_hook(lambda *args: None)
    run(model, optimizer, 3)
    twin, other = copied((model, optimizer))
    assert type(other) is type(optimizer)
    assert other.safety.probe.model is twin
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    before = copies(model.parameters())
    for _ in range(8):  # of a new process, where torch numbers hooks from 0 again
        torch.utils.hooks.RemovableHandle.next_id = 0
        other.register_step_post_hook(lambda *args: None)
    losses = run(twin, other, 4, start=3)
    assert equal(model.parameters(), before)
    assert run(model, optimizer, 4, start=3) == losses
    assert other.restore() == optimizer.restore()
    assert equal(model.parameters(), twin.parameters())
    assert [e.step for e in other.safety.history][:4] == [0, 2, 4, 6]
    third, last = build(name, refresh=EVERY, held=True, budget=0.0)
    last.load_state_dict(other.state_dict())
    assert last.safety.counters() == other.safety.counters()
    assert third is not twin


@names
def test_an_optimizer_copied_alone_brings_its_model(name):
    model, optimizer = build(name, refresh=EVERY)
    run(model, optimizer, 1)
    other = copy.deepcopy(optimizer)
    twin = other.safety.probe.model
    assert twin is not model
    run(twin, other, 3, start=1)
    run(model, optimizer, 3, start=1)
    assert equal(model.parameters(), twin.parameters())
    shallow = copy.copy(optimizer)
    assert shallow.safety is optimizer.safety
    run(model, shallow, 1, start=4)
    assert optimizer.safety.step_count == 5


@names
def test_copies_without_protection(name):
    model, optimizer = build(name, damping=0)
    twin, other = copy.deepcopy((model, optimizer))
    assert other.safety.probe.model is twin
    run(twin, other, 2)
    run(model, optimizer, 2)
    assert equal(model.parameters(), twin.parameters())


def test_named_parameters_keep_their_names():
    model = tiny_llama(layers=1)
    optimizer = ProjectedAdamW(model.named_parameters(), probe=probe_of(model), refresh=NEVER)
    run(model, optimizer, 1)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert (
        optimizer.state_dict()["param_groups"][0]["param_names"][0] == "model.embed_tokens.weight"
    )
