"""A quadratic task and a quadratic alignment loss, where gradient flow has a closed form.

u is the direction in which alignment is sharp. The task does not push along it at the start
(uᵀg = 0), but is coupled to it: uᵀHg ≠ 0 (conditions 2 and 3 of the AIC).
"""

import numpy as np
import pytest
import torch
from optimizer_table import NEVER
from quadratic import Quadratic, dense_basis, orthogonal, probe_of

from safeopt import ProjectedAdamW, safeguard
from safeopt.optim import PreconditionedSGD, SafetySAM

RATE, STEPS = 2e-3, 200
COUPLING = 0.6  # uᵀHg
EPS = 1e4  # far above every gradient: AdamW is then SGD with the learning rate lr/eps
AXES = orthogonal(5, seed=1)
U = AXES[:, 0]
# The maps alone, without the pull to the aligned model.
OPTIONS = {"trial_examples": 1, "examples": 4, "elastic": 0.0, "refresh": NEVER}


def problem(*, curvature=0.0, push=0.0, shapes=((2,), (3, 1))):
    """A task with uᵀHu = ``curvature``, uᵀg = ``push`` and uᵀHg = 0.6 at the start."""
    hessian = torch.diag(torch.tensor([curvature, 0.5, 1.0, 0.3, 0.7], dtype=torch.float64))
    hessian[0, 1] = hessian[1, 0] = COUPLING
    gradient = torch.tensor([push, 1.0, 0.5, -0.3, 0.2], dtype=torch.float64)
    return Quadratic(AXES @ hessian @ AXES.T, AXES @ gradient, shapes)


def probe(model):
    """Examples whose gradients span u and point both ways."""
    lengths = torch.tensor([1.0, -0.6, 2.0, -1.7, 1.5], dtype=torch.float64)
    return probe_of(model, lengths.view(-1, 1) * U)


def drift(model, optimizer, steps=STEPS):
    """c(t) = uᵀ(θ(t) − θ₀) after every step, at the unperturbed parameters."""
    positions = []
    for _ in range(steps):
        optimizer.step(lambda: model.closure(optimizer))
        if isinstance(optimizer, SafetySAM) and optimizer.mode == "lookahead":
            with optimizer.unperturbed():
                positions.append(float(U @ model.moved))
        else:
            positions.append(float(U @ model.moved))
    return np.array(positions)


def parts(positions):
    """The linear and the quadratic part of c(t): least squares on at + ½bt²."""
    t = RATE * np.arange(1, len(positions) + 1)
    return np.linalg.lstsq(np.stack([t, 0.5 * t * t], axis=1), positions, rcond=None)[0]


def exponent(values):
    """Slope of log value over log time between a fifth and all of the steps."""
    start = len(values) // 5
    return float(np.log(values[-1] / values[start - 1]) / np.log(len(values) / start))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=RATE, **options)


def adamw(model):
    return torch.optim.AdamW(
        model.parameters(), lr=RATE * EPS, eps=EPS, betas=(0.0, 0.999), weight_decay=0.0
    )


def projected_adamw(model, **options):
    return ProjectedAdamW(
        model.parameters(), lr=RATE * EPS, eps=EPS, betas=(0.0, 0.999), weight_decay=0.0,
        probe=probe(model), **{**OPTIONS, **options},
    )  # fmt: skip


def safety_sam(model, **options):
    return SafetySAM(sgd(model), probe=probe(model), **{"ascent": "task", **OPTIONS, **options})


def preconditioned_sgd(model, **options):
    # One refresh interval that is longer than the run, of the default length for τ's default.
    few = {name: OPTIONS[name] for name in ("trial_examples", "examples", "elastic")}
    chosen = {**few, "restore_alignment": False, **options}
    return PreconditionedSGD(model.parameters(), lr=RATE, probe=probe(model), **chosen)


def test_flow_is_the_solution_of_gradient_flow():
    """dx/dt = −∇L(x), x(0) = x₀; and SGD converges to it at first order in its step."""
    model, h = problem(push=0.1), 1e-5
    for time in (0.0, 0.3, 2.0):
        velocity = (model.flow(time + h) - model.flow(max(time - h, 0.0))) / (
            time + h - max(time - h, 0.0)
        )
        expected = -model.task_gradient(model.flow(time))
        assert (velocity - expected).norm() < 1e-4 * expected.norm()
    errors = []
    for steps in (100, 200):
        model = problem(push=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0 / steps)
        drift(model, optimizer, steps)
        errors.append(float((model.moved - model.flow(1.0)).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("optimizer_of", [sgd, adamw])
def test_plain_trajectories_leave_the_flat_plane(optimizer_of):
    """c(t) = ½γt² with γ = uᵀHg, and the alignment loss grows as t⁴."""
    model = problem()
    positions = drift(model, optimizer_of(model))
    flow = np.array([float(U @ model.flow(RATE * (i + 1))) for i in range(STEPS)])
    assert np.abs(positions - flow)[-1] < 0.01 * flow[-1]
    assert exponent(positions) == pytest.approx(2, abs=0.1)
    assert exponent(0.5 * positions**2) == pytest.approx(4, abs=0.2)
    linear, quadratic = parts(positions)
    assert quadratic == pytest.approx(COUPLING, rel=0.15)  # H's other entries bend it at t = 0.4
    assert abs(linear) < 0.02


def test_adamw_as_it_is_used_leaves_the_plane_at_once():
    """With a small eps AdamW divides by the gradient's size: the drift is linear, not quadratic."""
    model = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    assert exponent(np.abs(drift(model, optimizer, 100))) < 1.2


@pytest.mark.parametrize(
    ("optimizer_of", "options"),
    [
        (projected_adamw, {}),
        (projected_adamw, {"mode": "acceleration"}),
        (safety_sam, {"mode": "two_pass"}),
        (safety_sam, {"mode": "two_pass", "ascent": "safety"}),
        (safety_sam, {"mode": "lookahead"}),
        (safety_sam, {"mode": "two_pass", "protection": "acceleration"}),
        (safety_sam, {"mode": "lookahead", "protection": "acceleration"}),
        (preconditioned_sgd, {}),
        (preconditioned_sgd, {"mode": "acceleration"}),
        (preconditioned_sgd, {"mode": "acceleration", "tau": 1.0, "refresh": NEVER}),
    ],
)
def test_each_optimizer_cuts_the_quadratic_drift_a_hundredfold(optimizer_of, options):
    plain = problem(curvature=0.2)
    expected = parts(drift(plain, sgd(plain)))[1]
    model = problem(curvature=0.2)
    positions = drift(model, optimizer_of(model, **options))
    assert abs(parts(positions)[1]) < expected / 100
    assert float(model.task().detach()) < 0.7 * float(plain.task().detach())  # both below zero


@pytest.mark.parametrize(
    ("optimizer_of", "options", "rate"),
    [
        (projected_adamw, {"mode": "acceleration"}, 1.0),
        (safety_sam, {"mode": "two_pass", "protection": "acceleration", "rho": 1e-9}, 1.0),
        (safety_sam, {"mode": "lookahead", "protection": "acceleration", "rho": 1e-9}, 1.0),
        (preconditioned_sgd, {"mode": "acceleration", "tau": 2.0, "refresh": NEVER}, None),
    ],
)
def test_acceleration_leaves_the_first_order_drift(optimizer_of, options, rate):
    """With uᵀg = −0.1 at the start, c(t) = ċ₀t stays and ½c̈t² goes, whatever the task does."""
    model = problem(push=-0.1, curvature=0.2)
    optimizer = optimizer_of(model, **options)
    positions = drift(model, optimizer)
    if rate is None:
        rate = 1 / (1 + float(optimizer.safety.subspace.eigenvalues) / 2.0)
    expected = 0.1 * rate * RATE * np.arange(1, STEPS + 1)
    # AdamW's denominator, √v + eps, differs from eps by the gradient's size.
    assert np.abs(positions - expected).max() < 1e-3 * expected[-1]


def test_preconditioned_drift_is_slower_by_one_plus_lambda_over_tau():
    plain = problem()
    expected = drift(plain, sgd(plain))[-1]
    for tau in (0.3, 3.0):
        model = problem()
        optimizer = preconditioned_sgd(model, tau=tau, refresh=NEVER)
        factor = expected / drift(model, optimizer)[-1]
        eigenvalue = float(optimizer.safety.subspace.eigenvalues)
        assert factor == pytest.approx(1 + eigenvalue / tau, rel=0.05)


def test_sam_alone_holds_the_gradient_at_zero():
    """Where ρ‖Hu‖² exceeds the coupling, uᵀg slides along 0 and the drift stops (uᵀHu = 0).

    What is left is chatter around 0, in proportion to the learning rate.
    """
    plain = problem()
    expected = drift(plain, sgd(plain))
    for mode, cut in (("two_pass", 50), ("lookahead", 20)):
        model = problem()
        optimizer = safety_sam(model, mode=mode, damping=0, rho=3.0)
        positions = drift(model, optimizer)
        assert np.abs(positions).max() < expected[-1] / cut
        assert abs(float(U @ model.task_gradient(model.moved))) < 0.1 * COUPLING * RATE * STEPS


def test_sam_alone_drifts_linearly_where_the_task_is_curved_along_u():
    """ċ = uᵀHu·uᵀHg/‖Hu‖² on the sliding surface; the map takes it out."""
    model = problem(curvature=0.5)
    positions = drift(model, safety_sam(model, mode="two_pass", damping=0, rho=3.0))
    hu = model.hessian @ U
    velocity = float(U @ hu * (hu @ model.slope) / (hu @ hu))
    assert parts(positions)[0] == pytest.approx(velocity, rel=0.1)
    model = problem(curvature=0.5)
    protected = drift(model, safety_sam(model, mode="two_pass", rho=3.0))
    assert np.abs(protected).max() < 1e-12


def test_safety_ascent_rests_a_margin_below_the_optimum():
    """∇L(θ + ε) = 0: θ = θ* − ρu for an alignment loss that rises along u."""
    hessian = AXES @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 3.0, 2.0]).double()) @ AXES.T
    gradient = AXES @ torch.tensor([-0.4, 0.5, 0.5, -0.3, 0.2], dtype=torch.float64)
    optimum = -torch.linalg.solve(hessian, gradient)
    for mode in ("two_pass", "lookahead"):
        model = Quadratic(hessian, gradient)
        optimizer = SafetySAM(
            torch.optim.SGD(model.parameters(), lr=0.3), probe=probe_of(model, U.repeat(5, 1)),
            mode=mode, ascent="safety", damping=0, rho=0.05, **OPTIONS,
        )  # fmt: skip
        drift(model, optimizer, 100)
        optimizer.eval()
        assert (model.moved - (optimum - 0.05 * U)).norm() < 1e-9


@pytest.mark.parametrize(
    ("optimizer_of", "rate"),
    [
        (lambda m: safeguard(sgd(m), probe(m), mode="damp", damping=1e-300, **OPTIONS), RATE),
        (lambda m: projected_adamw(m, mode="damp", damping=1e-300), RATE * EPS),
        (lambda m: preconditioned_sgd(m, tau=2.0, refresh=NEVER), RATE),
        (lambda m: safety_sam(m, mode="two_pass", damping=0, rho=0.3), RATE),
        (lambda m: safety_sam(m, mode="lookahead", damping=0, rho=0.3), RATE),
    ],
    ids=["safeguard", "ProjectedAdamW", "PreconditionedSGD", "two_pass", "lookahead"],
)
def test_coupling_is_the_change_of_the_projected_gradient(optimizer_of, rate):
    """γ_t = ‖Λ^½UᵀH(x_t − x_{t−1})‖/η at the points x where gradients are taken; no extra pass.

    For a step −ηg it is the ‖F^½PHg‖ of condition 3.
    """
    model = problem(curvature=0.2, push=0.002)  # uᵀg, and with it SAM's ε, soon changes its sign
    optimizer = optimizer_of(model)
    seen = []
    for step in range(8):
        seen.append(model.moved)
        optimizer.step(lambda: model.closure(optimizer))
        if step == 0:
            passes = optimizer.safety.passes.as_dict()
            assert optimizer.safety.coupling is None
            continue
        weights = optimizer.safety.subspace.eigenvalues.sqrt()
        change = dense_basis(optimizer).T @ model.hessian @ (seen[-1] - seen[-2])
        expected = float((weights * change).norm()) / rate
        assert optimizer.safety.coupling == pytest.approx(expected, rel=1e-7)
        if isinstance(optimizer, torch.optim.SGD) and not isinstance(optimizer, PreconditionedSGD):
            product = dense_basis(optimizer).T @ model.hessian @ model.task_gradient(seen[-2])
            assert optimizer.safety.coupling == pytest.approx(float((weights * product).norm()))
    assert optimizer.safety.passes.as_dict() == passes
