"""The comparison of forecasts with finished runs: rank correlation and calibration."""

from __future__ import annotations

import pytest
from scipy.stats import spearmanr

from benchmarks.ranking import calibration, correlations, onset


def run(task, rate, predicted, measured):
    return {
        "task": task, "learning_rate": rate, "measured_rise": measured,
        "predicted": {"forecast": predicted, "flat": 0.0},
    }  # fmt: skip


def test_the_rank_correlation_is_spearmans():
    runs = [
        run("a", 1, 0.1, 0.2), run("b", 1, 0.3, 0.1), run("a", 2, 0.3, 0.5), run("b", 2, 0.9, 0.7),
    ]  # fmt: skip
    found = correlations(runs)
    expected = spearmanr([0.1, 0.3, 0.3, 0.9], [0.2, 0.1, 0.5, 0.7]).statistic
    assert found["forecast"]["all"] == pytest.approx(expected)
    assert found["forecast"]["tasks"] == pytest.approx(0.0), "wrong at rate 1, right at rate 2"
    assert found["forecast"]["rates"] == pytest.approx(1.0)
    assert found["flat"] == {"all": None, "tasks": None, "rates": None}


def test_the_breach_is_forecast_from_the_first_half_only():
    steps = range(0, 21, 2)
    found = calibration([(step, 0.1 + 1e-3 * step**2) for step in steps])
    assert (found["known_until"], found["reached"]) == (10, 16)
    assert found["power"]["step"] == pytest.approx(16, rel=1e-6)
    bent = [(step, 0.1 + 1e-3 * step**2 + 10.0 * (step > 10)) for step in steps]
    assert calibration(bent)["power"]["step"] > 100, "what comes later is not known"
    assert calibration([(step, 0.1) for step in steps]) is None
    fallen = [(step, 0.1 + 0.1 * (step < 10) * (step > 0) - 0.05 * (step > 10)) for step in steps]
    assert calibration(fallen) is None, "it ended below its start"


def test_a_run_that_did_not_rise_has_no_onset():
    risen = [(step, 0.1 + 1e-3 * step**2) for step in range(6)]
    assert onset(risen)["exponent"] == pytest.approx(2)
    assert onset([(0, 0.1), (2, 0.2), (4, 0.2), (6, 0.1)]) is None
