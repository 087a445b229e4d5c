r"""The quartic onset law: a closed-form forecast, and a fit of measured curves.

**Forecast.** With ε = ‖F^{1/2}Pg‖ and γ = ‖F^{1/2}PHg‖ of the Alignment Instability Condition,
gradient flow θ' = −g(θ) drifts inside the safety subspace, in the Fisher metric, by at least

    d(t) = ½γt² − εt    up to O(t³),

so the alignment loss rises by at least ½ max(0, d(t))², which for ε = 0 is γ²t⁴/8 (Springer et al.
2026, arXiv 2602.15799). γ carries the curvature already: no eigenvalue multiplies it once more.

**From steps to time.** t is the sum of the learning rates. SGD with a constant rate η has t = ηn
after n steps; a linear warm-up over w steps takes off about ηw/2; momentum β multiplies time by
1/(1−β) after its first 1/(1−β) steps. Nothing in the theory covers these:

- Adam divides each coordinate by its own gradient's size, so it follows another flow. Its first
  step has length η√n whatever ‖g‖ is: it runs ahead of t = ηn by ‖u‖/‖g‖, u its first update, and
  its curve bends by H in Adam's own metric. A forecast for ηn is then a loose lower bound.
- Warm-up makes early time pass as n², and multiplies every exponent in n by two while it lasts.
- LoRA starts at B = 0, where the gradient and the curvature of A vanish: ε and γ leave out what A
  does from the second step on.

Read it as an onset law: a bound on how soon trouble begins, not a model of the whole curve. An
alignment loss saturates.

**Fit.** `fit_onset` fits a measured rise by κtᵖ and compares the quartic with linear, quadratic and
saturating curves by Akaike's and the Bayesian information criterion. Akaike's is usually written
AIC, as is the Alignment Instability Condition; here it is called ``akaike``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LARGEST = 709.0  # of a logarithm: e^709 is still a number
_EXPONENTS = {"quartic": 4.0, "quadratic": 2.0, "linear": 1.0}


@dataclass(frozen=True)
class OnsetForecast:
    """The least rise of the alignment loss that gradient flow brings.

    Attributes:
        coupling: γ = ‖F^{1/2}PHg‖, at least 0.
        drift: ε = ‖F^{1/2}Pg‖, at least 0.
        learning_rate: η, the time that one step takes; positive.
        coupling_interval: interval of γ.
        drift_interval: interval of ε.

    Raises:
        ValueError: if a number is out of its range.
    """

    coupling: float
    drift: float
    learning_rate: float
    coupling_interval: tuple[float, float] | None = None
    drift_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("coupling", "drift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0, and finite")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a positive number")

    def rise(self, steps: float) -> float:
        """½ max(0, ½γt² − εt)² after so many steps, in nats a token."""
        time = self.learning_rate * steps
        return 0.5 * max(0.0, 0.5 * self.coupling * time**2 - self.drift * time) ** 2

    def forecast_breach(self, budget: float) -> Breach:
        """The step after which the rise exceeds a budget, at the latest.

        ½γt² − εt = √(2·budget) is solved for t.

        Args:
            budget: rise of the alignment loss, in nats a token; positive.
        """
        _check_budget(budget)
        gammas = self.coupling_interval or (self.coupling, self.coupling)
        drifts = self.drift_interval or (self.drift, self.drift)
        soonest = self._steps(budget, gammas[1], drifts[0])
        latest = self._steps(budget, gammas[0], drifts[1])
        return Breach(self._steps(budget, self.coupling, self.drift), (soonest, latest))

    def _steps(self, budget: float, coupling: float, drift: float) -> float:
        if coupling == 0:
            return math.inf
        # An interval may end at the largest number, whose square is none.
        root = math.hypot(drift, math.sqrt(coupling) * math.sqrt(2 * math.sqrt(2 * budget)))
        return (drift + root) / coupling / self.learning_rate


@dataclass(frozen=True)
class Breach:
    """When a budget is exceeded.

    Attributes:
        step: in optimizer steps, not rounded; infinite where it never happens.
        interval: 95% interval.
    """

    step: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class CurveFit:
    """One model of the rise, fitted.

    Attributes:
        name: ``"power"``, ``"quartic"``, ``"quadratic"``, ``"linear"`` or ``"saturating"``.
        parameters: ``kappa`` and ``exponent`` of κtᵖ, or ``plateau`` and ``time`` of
            plateau·(1 − exp(−t/time)).
        r_squared: share of the variance of the logarithms that is explained.
        akaike: Akaike's information criterion, up to a constant that the models share.
        bayesian: the Bayesian one. Lower is better for both.
        level: logarithm of ``kappa`` or ``plateau``. Of a steep curve that begins late κ, its rise
            at step 1, is too small for a number.
    """

    name: str
    parameters: Mapping[str, float]
    r_squared: float
    akaike: float
    bayesian: float
    level: float

    def rise(self, steps: float) -> float:
        """The model's rise after so many steps."""
        p = self.parameters
        if steps <= 0:
            return 0.0
        if self.name == "saturating":
            return p["plateau"] * -math.expm1(-steps / p["time"])
        return _exponential(self.level + p["exponent"] * math.log(steps))

    def breach(self, budget: float) -> float:
        """The first step at which the model's rise is at least ``budget``.

        Infinite where it stays below; 0 where κtᵖ begins above, as it does for p < 0.
        """
        p = self.parameters
        if self.name == "saturating":
            share = _exponential(math.log(budget) - self.level)
            return -p["time"] * math.log1p(-share) if share < 1 else math.inf
        missing = math.log(budget) - self.level
        if p["exponent"] <= 0:
            return 0.0 if p["exponent"] < 0 or missing <= 0 else math.inf
        return _exponential(missing / p["exponent"])


@dataclass(frozen=True)
class OnsetFit:
    """A fitted onset.

    Attributes:
        exponent: p of κtᵖ.
        exponent_interval: its 95% interval.
        kappa: κ, in nats a token at step 1.
        models: all fits by name.
        best: name of the model with the lowest Bayesian criterion.
        points: points used.
        dropped: points left out because the loss had not risen there.
        resampled: fits of each model to curves drawn around it, from which intervals are taken.
    """

    exponent: float
    exponent_interval: tuple[float, float]
    kappa: float
    models: Mapping[str, CurveFit]
    best: str
    points: int
    dropped: int
    resampled: Mapping[str, Sequence[CurveFit]]

    @property
    def r_squared(self) -> float:
        """R² of the power law, in logarithms."""
        return self.models["power"].r_squared

    def forecast_breach(self, budget: float, model: str = "power") -> Breach:
        """The step at which a model's rise reaches a budget, with its 95% interval.

        Args:
            budget: rise of the alignment loss, in nats a token; positive.
            model: a key of ``models``.

        Raises:
            ValueError: if ``budget`` is not positive or there is no such model.
        """
        _check_budget(budget)
        if model not in self.models:
            raise ValueError(f'model="{model}": expected one of {", ".join(self.models)}')
        steps = np.array([fit.breach(budget) for fit in self.resampled[model]])
        ends = np.quantile(steps, [0.025, 0.975], method="inverted_cdf")
        point = self.models[model].breach(budget)
        return Breach(point, (min(float(ends[0]), point), max(float(ends[1]), point)))

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "exponent": self.exponent,
            "exponent_interval": list(self.exponent_interval),
            "kappa": self.kappa,
            "r_squared": self.r_squared,
            "best": self.best,
            "points": self.points,
            "dropped": self.dropped,
            "models": {
                name: {
                    "parameters": dict(fit.parameters),
                    "r_squared": fit.r_squared,
                    "akaike": fit.akaike,
                    "bayesian": fit.bayesian,
                }
                for name, fit in self.models.items()
            },
        }


def fit_onset(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    start: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> OnsetFit:
    """Fit the rise of an alignment loss over steps.

    Errors are taken to be relative: all models are fitted to the logarithms by least squares, since
    an onset runs over orders of magnitude. Points that have not risen are left out, and counted.
    Intervals come from curves drawn around each model that scatter as the points do, and are wide
    where there are few points. Successive points of one run are not independent, so they are too
    narrow for what another run would do.

    Args:
        steps: optimizer steps of the measurements, or times; the one at 0 is taken as the start.
        losses: the alignment losses there.
        start: loss before training, where ``steps`` does not begin at 0.
        resamples: curves drawn around each model, at least 1.
        seed: of the draws.

    Raises:
        ValueError: if the lists do not fit, there is no start, a loss is not finite, or fewer than
            three points at different steps rose.
    """
    if len(steps) != len(losses):
        raise ValueError(f"losses: {len(losses)} values for {len(steps)} steps")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    t, loss = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if start is None:
        if not (t == 0).any():
            raise ValueError("start: no measurement at step 0; give the loss before training")
        start = float(loss[t == 0][0])
    lost = int((~np.isfinite(loss)).sum())
    if lost or not math.isfinite(start):
        raise ValueError(
            f"losses: {lost} of {len(loss)} measurements are not finite, start={start}; leave out "
            "what is no number"
        )
    later = t > 0
    risen = later & (loss > start)
    places = len(np.unique(t[risen]))
    if places < 3:
        raise ValueError(
            f"losses: only {int(risen.sum())} of {int(later.sum())} measurements lie above the "
            f"start, at {places} different steps; a curve needs three"
        )
    x, y = np.log(t[risen]), np.log(loss[risen] - start)
    models = {name: _fit(name, x, y) for name in ("power", *_EXPONENTS, "saturating")}
    rng = np.random.default_rng(seed)
    resampled = {
        name: [_fit(name, x, drawn) for drawn in _drawn(fit, x, y, resamples, rng)]
        for name, fit in models.items()
    }
    power = models["power"].parameters
    exponents = [fit.parameters["exponent"] for fit in resampled["power"]]
    low, high = np.quantile(exponents, [0.025, 0.975])
    return OnsetFit(
        exponent=power["exponent"],
        exponent_interval=(float(low), float(high)),
        kappa=power["kappa"],
        models=models,
        best=min(models, key=lambda name: models[name].bayesian),
        points=len(x),
        dropped=int(later.sum() - risen.sum()),
        resampled=resampled,
    )


def _fit(name: str, x: Array, y: Array) -> CurveFit:
    """A model fitted to y = log rise over x = log t; one more free number is σ."""
    if name == "saturating":
        times = np.exp(np.linspace(x.min() - 3, x.max() + 4, 400))
        errors = np.var(y - _shape("time", times[:, None], x), axis=1)
        scale, shaping, number = "plateau", "time", float(times[errors.argmin()])
    else:
        power = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
        scale, shaping, number = "kappa", "exponent", _EXPONENTS.get(name, power)
    residual = y - _shape(shaping, number, x)
    level = float(residual.mean())
    count, total = len(y), float(((y - y.mean()) ** 2).sum())
    error = float(((residual - level) ** 2).sum())
    fit = count * math.log(max(error / count, np.finfo(float).tiny))
    free = 2 if name in _EXPONENTS else 3
    return CurveFit(
        name,
        {scale: math.exp(min(level, _LARGEST)), shaping: number},
        1 - error / total if total > 0 else 0.0,
        fit + 2 * free,
        fit + math.log(count) * free,
        level,
    )


def _drawn(
    fit: CurveFit, x: Array, y: Array, count: int, rng: np.random.Generator
) -> Iterator[Array]:
    """Curves around a fitted model, each point off by its own residual times a normal number.

    Residuals are larger by 1/(1 − leverage), as of a curve without the point, since an onset's
    points scatter unequally (HC3: MacKinnon and White 1985); Student's factor is for their number.
    """
    shaping = "time" if fit.name == "saturating" else "exponent"
    middle = fit.level + _shape(shaping, fit.parameters[shaping], x)
    leverage, freedom = np.full(len(x), 1 / len(x)), len(x) - 1
    if fit.name not in _EXPONENTS:  # a second number is fitted
        leverage += (x - x.mean()) ** 2 / (len(x) * np.var(x))
        freedom -= 1
    deviation = (y - middle) / (1 - leverage)
    for _ in range(count):
        student = math.sqrt(freedom / rng.chisquare(freedom))
        yield middle + student * deviation * rng.standard_normal(len(x))


def _shape(shaping: str, number: float | Array, x: Array) -> Array:
    """Logarithms of a curve up to its scale: of tᵖ, or of 1 − exp(−t/time)."""
    return number * x if shaping == "exponent" else np.log(-np.expm1(-np.exp(x) / number))


def _exponential(x: float) -> float:
    return math.exp(x) if x <= _LARGEST else math.inf


def _check_budget(budget: float) -> None:
    if not 0 < budget < math.inf:
        raise ValueError(
            f"budget={budget}: expected a positive rise of the alignment loss, in nats"
        )
