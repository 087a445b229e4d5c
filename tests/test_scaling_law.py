"""The onset law against closed forms, and its fit against curves whose law is known."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from quadratic import Quadratic, orthogonal, probe_of

from safeopt.diagnostics import diagnose
from safeopt.diagnostics.scaling_law import OnsetForecast, fit_onset

STEPS = list(range(1, 41))


def curve(rise, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [0.1] + [0.1 + rise(n) * math.exp(noise * rng.standard_normal()) for n in STEPS]


def fit(rise, noise=0.0, seed=0):
    return fit_onset([0, *STEPS], curve(rise, noise, seed))


def test_the_forecast_is_its_closed_form():
    law = OnsetForecast(coupling=3.0, drift=0.0, learning_rate=0.01)
    assert law.rise(50) == pytest.approx(3.0**2 * 0.5**4 / 8, rel=1e-12)
    breach = law.forecast_breach(0.02).step
    assert law.rise(breach) == pytest.approx(0.02, rel=1e-9)
    drifting = OnsetForecast(3.0, 0.4, 0.01, (2.0, 4.0), (0.3, 0.5))
    breach = drifting.forecast_breach(0.02)
    assert drifting.rise(breach.step) == pytest.approx(0.02, rel=1e-9)
    assert drifting.rise(0.9 * 2 * 0.4 / 3.0 / 0.01) == 0, "a drift away from the subspace first"
    assert breach.interval[0] < breach.step < breach.interval[1]
    # The strongest coupling with the smallest drift is the soonest, and the other way round.
    ends = [OnsetForecast(gamma, eps, 0.01) for gamma, eps in ((4.0, 0.3), (2.0, 0.5))]
    assert breach.interval == tuple(end.forecast_breach(0.02).step for end in ends)
    assert OnsetForecast(0.0, 0.1, 0.01).forecast_breach(1.0).step == math.inf
    # Where a sample says nothing of a figure's spread, its interval ends at the largest number.
    most = sys.float_info.max
    breach = OnsetForecast(3.0, 0.4, 0.01, (0.0, most), (0.0, most)).forecast_breach(0.02)
    assert breach.interval == pytest.approx((0, math.inf))
    assert OnsetForecast(3.0, 0.4, 0.01, None, (0.3, most)).forecast_breach(0.02).step < math.inf


def test_a_system_that_starts_orthogonal_breaches_when_the_law_says():
    axes = orthogonal(12)
    hessian = 0.5 * (torch.outer(axes[0], axes[1]) + torch.outer(axes[1], axes[0]))
    model = Quadratic(hessian, axes[1])
    scale, values = 2.0, torch.tensor([3.0, 1.0], dtype=torch.float64)
    rows = (scale * values).sqrt()[:, None] * axes[[0, 2]]
    probe = probe_of(model, torch.cat([rows, -rows]))
    result = diagnose(probe, [0, 0], task_loss=lambda m, _: m.task(), rank=2)
    rate = 1e-3
    law = OnsetForecast(result.figures.coupling, result.figures.drift, rate)

    def rise(steps):
        moved = model.flow(rate * steps)
        return float(0.5 * (values * (axes[[0, 2]] @ moved) ** 2).sum())

    times = np.geomspace(5, 200, 20)
    fitted = fit_onset(times, [rise(t) for t in times], start=0.0)
    assert fitted.exponent == pytest.approx(4.0, abs=0.1)
    # γ²t⁴/8 with γ = √3·0.5: the mean gradient is orthogonal and turned by the coupling alone.
    assert fitted.kappa == pytest.approx(0.75 * rate**4 / 8, rel=0.05)
    budget = 1e-3
    steps = np.arange(1, 2000)
    true = steps[np.argmax([rise(n) >= budget for n in steps])]
    assert law.forecast_breach(budget).step == pytest.approx(true, rel=0.05)
    assert fitted.forecast_breach(budget).step == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    ("rise", "best", "exponent"),
    [
        (lambda n: 1e-6 * n**4, "quartic", 4.0),
        (lambda n: 1e-4 * n**2, "quadratic", 2.0),
        (lambda n: 1e-2 * n, "linear", 1.0),
        (lambda n: 0.4 * (1 - math.exp(-n / 8)), "saturating", None),
        (lambda n: 1e-4 * n**3, "power", 3.0),
    ],
)
def test_the_criteria_name_the_law_that_made_the_curve(rise, best, exponent):
    fitted = fit(rise, noise=0.05)
    assert fitted.best == best
    assert min(fitted.models, key=lambda name: fitted.models[name].akaike) in (best, "power")
    if exponent is not None:
        low, high = fitted.exponent_interval
        assert low < exponent < high
        assert high - low < 0.3
        assert fitted.r_squared > 0.95
    assert fitted.models["saturating"].breach(1e9) == math.inf


def test_the_criteria_are_those_of_least_squares_in_logarithms():
    """n log(RSS/n) + 2p, and p log n: one number for a fixed exponent, two else, and σ."""
    fitted = fit(lambda n: 1e-4 * n**3, noise=0.2)
    x = np.log(STEPS)
    y = np.log(np.array(curve(lambda n: 1e-4 * n**3, 0.2)[1:]) - 0.1)
    errors = {"power": np.polyfit(x, y, 1, full=True)[1][0]}
    for name, exponent in (("quartic", 4), ("quadratic", 2), ("linear", 1)):
        errors[name] = len(y) * np.var(y - exponent * x)
    for name, error in errors.items():
        model, free = fitted.models[name], 3 if name == "power" else 2
        likelihood = len(y) * math.log(error / len(y))
        assert model.akaike == pytest.approx(likelihood + 2 * free)
        assert model.bayesian == pytest.approx(likelihood + math.log(len(y)) * free)
        assert model.r_squared == pytest.approx(1 - error / (len(y) * np.var(y)))
    assert [model.rise(0) for model in fitted.models.values()] == [0] * 5
    saturating = fitted.models["saturating"]
    penalty = saturating.bayesian - saturating.akaike
    assert penalty == pytest.approx(3 * (math.log(len(y)) - 2))


def test_the_breach_interval_covers_a_repeated_run():
    def rise(n):
        return 1e-6 * n**4

    hits = 0
    for seed in range(20):
        breach = fit(rise, noise=0.1, seed=seed).forecast_breach(rise(60))
        hits += breach.interval[0] <= 60 <= breach.interval[1]
        assert breach.step == pytest.approx(60, rel=0.1)
    assert hits >= 16


@pytest.mark.parametrize("points", [3, 4, 8])
def test_intervals_cover_also_where_there_are_few_points(points):
    """A run of `safeopt finetune` measures its alignment loss at few steps."""
    steps = np.arange(1, points + 1)
    exponents = breaches = 0
    for seed in range(40):
        noise = 0.15 * np.random.default_rng(seed).standard_normal(points)
        fitted = fit_onset(steps, 1e-3 * steps**2 * np.exp(noise), start=0.0, resamples=100)
        exponents += fitted.exponent_interval[0] <= 2 <= fitted.exponent_interval[1]
        low, high = fitted.forecast_breach(1e-3 * (2 * points) ** 2).interval
        breaches += low <= 2 * points <= high
    assert min(exponents, breaches) >= 34


@pytest.mark.parametrize(
    ("steps", "rises", "budget", "step"),
    [
        ((1, 2, 3, 4), (0.5, 0.5, 0.5, 0.5), 1.0, math.inf),
        ((1, 2, 3, 4), (0.5, 0.5, 0.5, 0.5), 0.2, 0.0),
        ((1, 2, 3, 4), (0.8, 0.5, 0.4, 0.3), 0.1, 0.0),
        # κ, the rise at step 1, is e^-2072: no number in float64.
        ((1000, 1001, 1002), tuple(0.1 * (n / 1000) ** 300 for n in (1000, 1001, 1002)), 0.2, None),
    ],
)
def test_curves_that_stay_or_fall_or_begin_late_have_a_breach(steps, rises, budget, step):
    fitted = fit_onset(steps, rises, start=0.0)
    expected = 1000 * 2 ** (1 / 300) if step is None else step
    breach = fitted.forecast_breach(budget)
    assert breach.step == pytest.approx(expected)
    assert breach.interval == pytest.approx((expected, expected))
    assert fitted.models["power"].rise(steps[-1]) == pytest.approx(rises[-1], rel=0.1)
    json.dumps(fitted.as_json(), allow_nan=False)


def test_points_that_did_not_rise_are_counted_and_too_few_are_refused():
    losses = curve(lambda n: 1e-6 * n**4)
    losses[3] = 0.05
    assert fit_onset([0, *STEPS], losses).dropped == 1
    with pytest.raises(ValueError, match="only 0 of 40 measurements lie above"):
        fit_onset([0, *STEPS], [0.1] * 41)
    with pytest.raises(ValueError, match=r"only 3 of 3 .* at 2 different steps; a curve needs"):
        fit_onset([0, 1, 1, 2], [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="start: no measurement at step 0"):
        fit_onset(STEPS, losses[1:])
    with pytest.raises(ValueError, match="41 values for 40 steps"):
        fit_onset(STEPS, losses)
    for lost in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 of 41 measurements are not finite"):
            fit_onset([0, *STEPS], [*losses[:-1], lost])
    with pytest.raises(ValueError, match="budget=0"):
        fit_onset([0, *STEPS], losses).forecast_breach(0)
    with pytest.raises(ValueError, match='model="cubic"'):
        fit_onset([0, *STEPS], losses).forecast_breach(1.0, "cubic")
    with pytest.raises(ValueError, match="learning_rate=0"):
        OnsetForecast(1.0, 0.0, 0.0)
