"""What a protected step does to the parameters, for all optimizers of the table."""

import pytest
import torch
from optimizer_table import NEVER, OPTIMIZERS, OVERWRITING, build, copies, equal, probe_of, run
from quadratic import Quadratic, dense_basis, orthogonal
from quadratic import probe_of as quadratic_probe
from tiny_models import task_step, tiny_llama, trainable, with_lora
from tolerances import COORDINATE

from safeopt import ProjectedAdamW, RefreshPolicy, SafetySAM, safeguard

names = pytest.mark.parametrize("name", OPTIMIZERS)


def dense_coordinates(safety, params, anchors):
    """Uᵀ(θ − θ_r) in float64, from a copy of θ_r."""
    return sum(
        block.double().flatten(1) @ (p.detach().double() - anchor.double()).flatten()
        for block, p, anchor in zip(safety.subspace.basis.blocks, params, anchors, strict=True)
    )


@names
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("mode", ["project", "damp", "acceleration", "budget"])
def test_coordinates_after_every_step(name, mode, restore):
    """c⁺ = Uᵀ(θ − θ_r) to float32 accuracy; zero in mode "project"."""
    model, optimizer = build(
        name, mode=mode, refresh=RefreshPolicy.fixed(4), budget=0.05, restore_alignment=restore
    )
    params = trainable(model)
    norm = float(torch.cat([p.detach().flatten() for p in params]).norm())
    anchors, moved = copies(params), 0.0
    for step in range(1, 11):
        task_step(model, step)
        optimizer.step()
        safety = optimizer.safety
        if safety.last_refresh == step:
            anchors = copies(params)
            assert step % 4 == 0
        actual = dense_coordinates(safety, params, anchors)
        expected = safety.vectors()["position"]
        assert (actual - expected).abs().max() < COORDINATE[torch.float32] * norm
        assert (safety.subspace.coordinates(params) - expected).abs().max() < (
            COORDINATE[torch.float32] * norm
        )
        moved = max(moved, float(expected.abs().max()))
        assert safety.predicted == safety.subspace.surrogate.predict(expected)
    assert (moved == 0) == (mode == "project")


@names
def test_budget_bounds_the_surrogate_at_every_step(name):
    """Â ≤ A₀ + budget; where an anchor is above it already, Â does not rise further."""
    model, optimizer = build(
        name, mode="budget", budget=0.01, refresh=RefreshPolicy.fixed(5), restore_alignment=False
    )
    for step in range(12):
        task_step(model, step)
        optimizer.step()
        safety = optimizer.safety
        limit = max(safety.reference + 0.01, safety.subspace.surrogate.value)
        assert safety.predicted <= limit + 1e-9


@names
def test_acceleration_leaves_the_first_drift(name):
    model, optimizer = build(name, mode="acceleration", refresh=NEVER)
    run(model, optimizer, 1)
    drift = optimizer.safety.vectors()["position"].clone()
    run(model, optimizer, 4, start=1)
    assert torch.allclose(optimizer.safety.vectors()["position"], 5 * drift, rtol=1e-9)


@names
@pytest.mark.parametrize("lora", [False, True])
def test_no_damping_is_the_base_optimizer_bit_for_bit(name, lora):
    def model():
        plain = tiny_llama(layers=1)
        return with_lora(plain, random_b=False) if lora else plain

    protected, optimizer = build(name, model=model(), damping=0)
    plain = model()
    run(protected, optimizer, 10)
    run(plain, OPTIMIZERS[name].plain(trainable(plain), 1e-2), 10)
    assert equal(protected.parameters(), plain.parameters())
    assert optimizer.safety.passes.forward == 0
    assert optimizer.safety.history == []
    assert "safety" not in optimizer.state_dict()
    with pytest.raises(RuntimeError, match="damping=0"):
        optimizer.restore()


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3},
        {"amsgrad": True, "betas": (0.8, 0.99), "eps": 1e-6},
        {"maximize": True, "foreach": True},
        {"foreach": False, "lr": torch.tensor(3e-3)},
        {"fused": True},
    ],
)
def test_all_adamw_arguments_reach_adamw(options):
    models = [tiny_llama(layers=1), tiny_llama(layers=1)]
    protected = ProjectedAdamW(
        models[0].parameters(), probe=probe_of(models[0]), damping=0, **options
    )
    plain = torch.optim.AdamW(models[1].parameters(), **options)
    for model, optimizer in zip(models, (protected, plain), strict=True):
        run(model, optimizer, 10)
    assert equal(models[0].parameters(), models[1].parameters())
    assert protected.defaults == plain.defaults


@names
def test_random_subspace_control_changes_nothing(name):
    """The control: a random subspace of 8 of 75,000 dimensions leaves the task's losses alone."""
    protected, plain = tiny_llama(hidden=64), tiny_llama(hidden=64)
    assert sum(p.numel() for p in trainable(protected)) >= 50_000
    _, optimizer = build(
        name, model=protected, curvature="random", refresh=RefreshPolicy.fixed(5), lr=1e-3
    )
    losses = run(protected, optimizer, 12)
    expected = run(plain, OPTIMIZERS[name].plain(trainable(plain), 1e-3), 12)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses != expected
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)


@names
def test_groups_without_protection_move_as_ever(name):
    """With given gradients, a group with ``protect=False`` follows the base optimizer."""

    def groups(model):
        first, *rest = trainable(model)
        return [{"params": rest}, {"params": [first], "protect": False, "lr": 3e-3}]

    protected, plain = tiny_llama(layers=1), tiny_llama(layers=1)
    _, optimizer = build(name, model=protected, params=groups(protected), refresh=NEVER)
    base = OPTIMIZERS[name].plain(groups(plain), 1e-2)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(trainable(protected), trainable(plain), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        base.step()
    free, reference = trainable(protected), trainable(plain)
    assert torch.equal(free[0], reference[0])
    assert not any(torch.equal(p, q) for p, q in zip(free[1:], reference[1:], strict=True))
    assert len(optimizer.safety.subspace.basis.blocks) == len(free) - 1


@names
def test_basis_stays_float32_with_bfloat16_parameters(name):
    model, optimizer = build(name, model=tiny_llama(layers=1, dtype=torch.bfloat16))
    run(model, optimizer, 5)
    blocks = optimizer.safety.subspace.basis.blocks
    assert {block.dtype for block in blocks} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert equal(optimizer.safety.subspace.basis.blocks, blocks)
    assert {b.dtype for b in optimizer.safety.subspace.basis.blocks} == {torch.float32}


@names
def test_schedulers_set_the_learning_rate(name):
    model, optimizer = build(name, refresh=NEVER)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    params, rates = copies(model.parameters()), []
    for step in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        task_step(model, step)
        optimizer.step()
        scheduler.step()
        if step == 0:  # a warm-up's first step has learning rate 0: nothing moves or counts
            assert equal(model.parameters(), params)
    assert rates == pytest.approx([0, 0.0025, 0.005])
    assert optimizer.safety.step_count == 2


@pytest.mark.parametrize("guarded", [True, False])
def test_the_coupling_follows_a_learning_rate_that_jumps(guarded):
    """‖Λ^½UᵀHg‖ of the last gradient, by the rate with which it was followed."""
    spread = orthogonal(12)
    hessian = spread @ torch.linspace(0.5, 3, 12).double().diag() @ spread.T
    generator = torch.Generator().manual_seed(1)
    slope, *directions = torch.randn(7, 12, generator=generator).double()
    model = Quadratic(hessian, slope)
    options = {"rank": 4, "trial_examples": 1, "elastic": 0.0, "refresh": NEVER}
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    probe = quadratic_probe(model, torch.stack(directions))
    if guarded:
        optimizer = safeguard(sgd, probe, mode="none", **options)
    else:
        optimizer = SafetySAM(
            sgd, probe=probe, rho=1e-9, mode="two_pass", protection="none", **options
        )
    before = None
    for rate in (1e-3, 1e-1, 1e-4, 1e-4):
        optimizer.param_groups[0]["lr"] = rate
        gradient = model.task_gradient(model.moved)
        optimizer.step(lambda: model.closure(optimizer))
        if before is not None:
            weights = optimizer.safety.subspace.eigenvalues.sqrt()
            expected = float((weights * (dense_basis(optimizer).T @ hessian @ before)).norm())
            assert optimizer.safety.coupling == pytest.approx(expected, rel=1e-6)
        before = gradient


@pytest.mark.parametrize("elastic", [0.0, 1.0])
@pytest.mark.parametrize("base", OVERWRITING)
def test_the_coupling_is_that_of_the_tasks_own_gradients(base, elastic):
    """Not of what an optimizer that computes inside of them has left there."""
    generator = torch.Generator().manual_seed(1)
    slope, *directions = torch.randn(7, 12, generator=generator).double()
    model = Quadratic(torch.linspace(0.5, 3, 12).double().diag(), slope)
    optimizer = safeguard(
        OVERWRITING[base](model.parameters(), lr=0.02),
        quadratic_probe(model, torch.stack(directions)),
        mode="none", rank=4, trial_examples=1, elastic=elastic, refresh=NEVER,
    )  # fmt: skip
    if base == "schedule-free":
        optimizer.train()
    inside = []
    for _ in range(3):
        gradient = model.task_gradient(model.moved)
        optimizer.step(lambda: model.closure(optimizer))
        inside.append(dense_basis(optimizer).T @ gradient)
        if len(inside) > 1:
            change = (inside[-1] - inside[-2]) / 0.02
            weights = optimizer.safety.subspace.eigenvalues.sqrt()
            expected = float((weights * change).norm())
            assert optimizer.safety.coupling == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_fused_steps_gradients_count_without_the_loss_scale(nesterov):
    """A gradient scaler leaves it to the step to divide them, which does it in place."""
    found = []
    for scale in (None, 64.0):
        generator = torch.Generator().manual_seed(1)
        slope, *directions = torch.randn(7, 12, generator=generator).double()
        model = Quadratic(torch.linspace(0.5, 3, 12).double().diag(), slope)
        optimizer = safeguard(
            torch.optim.SGD(
                model.parameters(), lr=0.02, momentum=0.9, nesterov=nesterov, fused=True
            ),
            quadratic_probe(model, torch.stack(directions)),
            rank=4, trial_examples=1, elastic=1.0, refresh=NEVER,
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model.task()).backward()
            scaler.step(optimizer)
            scaler.update()
        squares = [block[2].sum() for block in optimizer.safety.pull.blocks]
        found.append([optimizer.safety.coupling, *map(float, squares)])
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_safeguard_changes_the_optimizer_it_is_given():
    model = tiny_llama(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = optimizer.param_groups
    assert safeguard(optimizer, probe_of(model)) is optimizer
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups is groups
    with pytest.raises(ValueError, match="protected already"):
        safeguard(optimizer, probe_of(model))
    with pytest.raises(ValueError, match="protected already"):
        safeguard(ProjectedAdamW(model.parameters(), probe=probe_of(model)), probe_of(model))
