"""The quadratic model and its maps: closed forms, limits, and an independent solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from safeopt.curvature.surrogate import Surrogate, damp, limit_to_budget, remove_acceleration
from safeopt.optim.config import SafetyConfig
from safeopt.optim.interval import Interval


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_surrogate(k=4, seed=0, sharpness=0.7, value=0.3):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(k, generator=generator, dtype=torch.float64)
    eigenvalues = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    point = 3 * torch.randn(k, generator=generator, dtype=torch.float64)
    return Surrogate(value, gradient, sharpness * eigenvalues), point


def test_prediction_and_slope_equal_the_quadratic():
    """½(x − m)ᵀH(x − m) + d has a known value and gradient everywhere."""
    minimum, curvature = tensor(1, -2, 0.5), tensor(3, 1, 0.1)
    value = 0.25 + 0.5 * float((curvature * minimum**2).sum())
    model = Surrogate(value, -curvature * minimum, curvature)
    for c in (tensor(0, 0, 0), minimum, tensor(-1, 4, 2)):
        closed = 0.25 + 0.5 * float((curvature * (c - minimum) ** 2).sum())
        assert model.predict(c) == pytest.approx(closed, rel=1e-12)
        assert torch.allclose(model.slope(c), curvature * (c - minimum), atol=1e-12)


def test_moved_is_the_same_quadratic():
    model, c = random_surrogate()
    step = tensor(0.1, -0.4, 0.2, 1.0)
    moved = model.moved(step, model.predict(step))
    assert moved.predict(c) == pytest.approx(model.predict(step + c), rel=1e-12)
    assert torch.allclose(moved.slope(c), model.slope(step + c))


def test_damp_limits():
    c, target, curvature = tensor(1, 2, 3), tensor(0.5, 0, -1), tensor(4, 1, 0)
    assert torch.equal(damp(c, target, curvature, 0.0), c)
    far = damp(c, target, curvature, 1e15)
    assert torch.allclose(far[:2], target[:2], atol=1e-12)
    assert far[2] == c[2]  # no curvature, nothing to protect


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_damp_is_the_proximal_map(seed, strength):
    """The gradient of ½‖x − c‖² + κ/2 (x − c*)ᵀΛ(x − c*) vanishes; each entry moves to c*."""
    model, c = random_surrogate(seed=seed)
    target = model.gradient
    x = damp(c, target, model.eigenvalues, strength)
    gradient = x - c + strength * model.eigenvalues * (x - target)
    assert gradient.abs().max() < 1e-9 * (1 + strength)
    assert ((x - target).abs() <= (c - target).abs() + 1e-12).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.floats(0, 10),
    st.floats(1e-2, 1e2),
    st.floats(0, 5),
    st.floats(1e-6, 1e3),
)
def test_budget_is_kept(seed, k, budget, sharpness, value, reach):
    model, c = random_surrogate(k, seed, sharpness, value)
    c = reach * c
    mapped = limit_to_budget(c, model, budget)
    assert mapped.isfinite().all()
    assert model.predict(mapped) <= model.value + budget + 1e-12
    if model.predict(c) <= model.value + budget:
        assert torch.equal(mapped, c)
    else:
        # On the boundary, and c − c⁺ is normal to it: the nearest point of a convex set.
        normal, gap = model.slope(mapped), c - mapped
        cosine = float(normal @ gap / (normal.norm() * gap.norm()))
        assert cosine == pytest.approx(1, abs=1e-6)
        rise = model.predict(mapped) - model.value
        assert rise == pytest.approx(budget, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("seed", "budget"), [(0, 0.1), (1, 0.0), (2, 1.0), (3, 0.02)])
def test_budget_finds_the_nearest_point(seed, budget):
    model, c = random_surrogate(seed=seed)
    rows = model.gradient.numpy(), model.eigenvalues.numpy()
    found = minimize(
        lambda x: 0.5 * ((x - c.numpy()) ** 2).sum(),
        np.zeros(4),
        jac=lambda x: x - c.numpy(),
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda x: budget - rows[0] @ x - 0.5 * (rows[1] * x * x).sum(),
            "jac": lambda x: -rows[0] - rows[1] * x,
        },
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    mapped = limit_to_budget(c, model, budget).numpy()
    assert np.abs(mapped - found.x).max() < 1e-5


def test_budget_zero_without_slope_leaves_the_flat_directions():
    model = Surrogate(0.0, tensor(0, 0), tensor(1, 0))
    mapped = limit_to_budget(tensor(2, 3), model, 0.0)
    assert model.predict(mapped) <= 0
    assert mapped[0] == pytest.approx(0, abs=1e-8)


def test_remove_acceleration_leaves_the_linear_drift():
    """c(t) = vt + ½at²: with the map after every step only the first step's drift is repeated."""
    velocity, acceleration = tensor(0.3, -0.1), tensor(0.05, 0.2)
    drift, position = None, tensor(0, 0)
    for t in range(1, 20):
        step = velocity + acceleration * (t - 0.5)  # c(t) − c(t − 1)
        free = position + step
        drift = free - position if drift is None else drift
        position = remove_acceleration(position, drift)
        assert torch.allclose(position, t * (velocity + 0.5 * acceleration), atol=1e-14)


@pytest.mark.parametrize("measured", [0.1, 0.25, 0.4])
def test_the_budget_counts_from_the_reference(measured):
    """Â(c⁺) ≤ reference + budget; above it already, it rises no more, nor is it to fall."""
    model, c = Surrogate(measured, tensor(1, 0), tensor(2, 1)), tensor(1, 1)
    config = SafetyConfig(mode="budget", budget=0.1)
    mapped = Interval.at(c).mapped(c, model, config, reference=0.2)
    assert model.predict(mapped) == pytest.approx(max(measured, 0.3), abs=1e-9)


def test_damping_is_relative_to_the_mean_curvature():
    """A loss in other units, or of none at all, is damped alike."""
    c, config = tensor(1, -2), SafetyConfig(mode="damp", damping=3.0)
    for scale in (1e-9, 1.0, 1e9):
        model = Surrogate(0.0, tensor(0, 0), scale * tensor(3, 1))
        mapped = Interval.at(c).mapped(c, model, config, reference=0.0)
        assert torch.allclose(mapped, c / (1 + 3 * tensor(1.5, 0.5)), rtol=1e-12)
    flat = Surrogate(0.0, tensor(0, 0), tensor(0, 0))
    assert torch.equal(Interval.at(c).mapped(c, flat, config, reference=0.0), c)


def test_drift_is_the_rise_without_the_map():
    """Steps of the base optimizer add up, whatever the map has left of each."""
    model = Surrogate(0.3, tensor(0.1, 0.2), tensor(2, 1))
    interval = Interval.at(tensor(0, 0))
    assert interval.drift(model) == 0
    for step, kept in ((tensor(1, 0), tensor(0.5, 0)), (tensor(0, 2), tensor(0.5, 1))):
        interval.advance(interval.position + step, kept)
    assert interval.drift(model) == pytest.approx(model.predict(tensor(1, 2)) - 0.3)
    assert torch.equal(interval.position, tensor(0.5, 1))


def test_the_first_drift_is_that_of_the_first_step():
    """Also where the interval does not begin at its anchor; later steps do not change it."""
    model, config = Surrogate(0.0, tensor(0, 0), tensor(1, 1)), SafetyConfig(mode="acceleration")
    interval = Interval(tensor(1, 1), tensor(0, 0))
    for step, expected in ((tensor(0.1, 0.2), tensor(1.1, 1.2)), (tensor(5, 5), tensor(1.2, 1.4))):
        c = interval.position + step
        interval.advance(c, interval.mapped(c, model, config, reference=0.0))
        assert torch.allclose(interval.position, expected)
