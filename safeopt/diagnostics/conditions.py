"""The Alignment Instability Condition (AIC), as figures with intervals and thresholds.

Springer et al. 2026 (arXiv 2602.15799) call an aligned model unstable under a fine-tuning task if

1. **low-rank sensitivity**: λ_k ≥ λ while Σ_{j>k} λ_j ≤ ε, for the eigenvalues λ_j of the safety
   curvature F;
2. **initial orthogonality**: ‖Pg‖ ≤ ε, P the projector on the top k eigenvectors, g the task's
   gradient: the first steps seem harmless;
3. **curvature coupling**: ‖F^{1/2} P H g‖ ≥ γ, H the task's Hessian: the trajectory bends into the
   sensitive directions.

The paper leaves the constants open. Here the tail of 1 is a share of the trace and ‖Pg‖ a share of
‖g‖, which a rescaling of either loss does not change, and the coupling is compared with that of a
random direction as long as Hg: what exceeds 99% of these has been aimed at the subspace.

The AIC has nothing to do with Akaike's information criterion, which `safeopt.diagnostics.
scaling_law` calls by its full name.

Intervals are those of a delete-one jackknife (Efron 1982) over safety examples and over task
batches, on the logarithms of the figures. They say what as many other prompts and batches of the
same kinds would have given; they do not know what k, the model's dtype or LoRA's start do. A
bootstrap is no choice here: m draws with replacement hold 0.63m different examples, whose spectrum
is that of a smaller sample. On simulated gradients (m = 32, k = 16, 8 batches) its 95% intervals
hold the tail in 49% of the cases, the jackknife's in 95%.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from safeopt.diagnostics.measure import Evidence
from safeopt.diagnostics.spectrum import Spectrum

_RANDOM_DIRECTIONS = 4096
_SHARES = ("tail", "overlap", "update_overlap")
_LARGEST_REACH = 700.0  # of a logarithm: e^700 is still a number


@dataclass(frozen=True)
class Thresholds:
    """Where a condition begins to hold.

    Args:
        tail: the largest share of the curvature outside the top k directions.
        overlap: the largest ‖Pg‖/‖g‖; 0.1 is 0.1 radians from a right angle.
        coupling_quantile: the coupling is compared with this quantile of random directions'.
        top_eigenvalue: λ_1 above it is flagged, as in the paper. It depends on the loss's scale (a
            mean or a sum over tokens, the data, the parameters chosen) as the conditions do not.

    Raises:
        ValueError: if an argument is out of its range.
    """

    tail: float = 0.1
    overlap: float = 0.1
    coupling_quantile: float = 0.99
    top_eigenvalue: float = 150.0

    def __post_init__(self) -> None:
        for name in ("tail", "overlap", "coupling_quantile"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number between 0 and 1")
        if not self.top_eigenvalue > 0:
            raise ValueError(f"top_eigenvalue={self.top_eigenvalue}: expected a positive number")


@dataclass(frozen=True)
class Condition:
    """One condition of the AIC.

    Attributes:
        name: ``"low_rank_sensitivity"``, ``"initial_orthogonality"`` or ``"curvature_coupling"``.
        value: tail share; ‖Pg‖/‖g‖; ‖F^{1/2} P H g‖.
        interval: 95% interval of the value.
        threshold: with which it is compared.
        holds: whether it is on the unstable side of the threshold.
        certain: whether all of the interval is on the same side.
    """

    name: str
    value: float
    interval: tuple[float, float]
    threshold: float
    holds: bool
    certain: bool


@dataclass(frozen=True)
class Figures:
    """The figures of one sample of safety examples and task batches.

    Attributes:
        top: λ_1.
        lowest: λ_k; 0 where fewer than k directions have any curvature.
        tail: share of the trace in Σ_{j>k} λ_j.
        effective_rank: (Σλ)²/Σλ².
        overlap: ‖Pg‖/‖g‖ of the mean task gradient.
        update_overlap: mean over the batches of ‖Pu_b‖/‖u_b‖, u_b Adam's first update.
        drift: ε = ‖F^{1/2} P g‖.
        coupling: γ = ‖F^{1/2} P H g‖.
    """

    top: float
    lowest: float
    tail: float
    effective_rank: float
    overlap: float
    update_overlap: float
    drift: float
    coupling: float


NAMES = tuple(Figures.__dataclass_fields__)


def figures(
    evidence: Evidence,
    rank: int,
    examples: Tensor | None = None,
    batches: Tensor | None = None,
) -> Figures:
    """The figures of a sample.

    Args:
        evidence: what was measured.
        rank: k.
        examples: indices of safety examples, with repetition; all by default.
        batches: likewise of task batches.

    Cost: an eigendecomposition of an m×m matrix; no pass through the model.
    """
    m, count = evidence.gradient.shape
    examples = torch.arange(m, device="cpu") if examples is None else examples
    batches = torch.arange(count, device="cpu") if batches is None else batches
    spectrum = Spectrum.of(evidence.gram[examples][:, examples])
    k = spectrum.rank(rank)
    weights = evidence.weights[batches] / evidence.weights[batches].sum()
    products = evidence.gradient_products[batches][:, batches]
    length = float((weights @ products @ weights).clamp(min=0).sqrt())
    gradient = spectrum.coordinates(evidence.gradient[examples][:, batches] @ weights, k)
    updates = spectrum.coordinates(evidence.update[examples][:, batches], k).norm(dim=0)
    lengths = evidence.update_norms[batches]
    bent = evidence.bending[examples][:, batches][:, :, batches] @ weights @ weights
    bending = spectrum.coordinates(bent, k)
    root = spectrum.eigenvalues[:k].sqrt()
    trace = spectrum.trace
    return Figures(
        top=float(spectrum.eigenvalues[0]),
        lowest=float(spectrum.eigenvalues[k - 1]) if k == rank else 0.0,
        tail=spectrum.tail(k) / trace if trace > 0 else 0.0,
        effective_rank=spectrum.effective_rank,
        overlap=float(gradient.norm()) / length if length > 0 else 0.0,
        update_overlap=float((updates / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).mean()),
        drift=float((root * gradient).norm()),
        coupling=float((root * bending).norm()),
    )


def intervals(
    evidence: Evidence, rank: int, point: Figures, *, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Jackknife intervals of all figures, by their names.

    Args:
        evidence: what was measured.
        rank: k.
        point: the figures of the whole sample.
        level: of the interval.

    Cost: the figures of m + B smaller samples.
    """
    m, count = evidence.gradient.shape
    samples = (
        [figures(evidence, rank, examples=rest) for rest in _without_each(m)],
        [figures(evidence, rank, batches=rest) for rest in _without_each(count)],
    )
    found = {}
    for name in NAMES:
        groups = [[getattr(sample, name) for sample in group] for group in samples]
        low, high = jackknife_interval(getattr(point, name), groups, level)
        found[name] = (low, min(high, 1.0)) if name in _SHARES else (low, high)
    return found


def _without_each(count: int) -> list[Tensor]:
    """All indices but one, for each of them; nothing to leave out of a single one."""
    everything = torch.arange(count, device="cpu")
    return [everything[everything != left_out] for left_out in range(count)] if count > 1 else []


def jackknife_interval(
    point: float, groups: Sequence[Sequence[float]], level: float
) -> tuple[float, float]:
    """The interval of a figure ≥ 0 that depends on several independent samples.

    The variance is the sum of the samples' jackknife variances (q−1)/q Σ(v_i − v̄)², v_i the figure
    without the i-th of q members, in logarithms where all are positive. Its degrees of freedom are
    Welch's and Satterthwaite's. Where a figure is zero without any one member, as the tail with
    k = m − 1, the sample says nothing of its spread: the interval ends at the largest number.

    Args:
        point: the figure.
        groups: for each sample the figures without each of its members; empty for a sample of one.
        level: of the interval.
    """
    if point > 0 and any(group and not any(group) for group in groups):
        return 0.0, sys.float_info.max
    positive = point > 0 and all(value > 0 for group in groups for value in group)
    parts = []  # variance and degrees of freedom of each sample
    for group in groups:
        if group:
            values = torch.tensor(group, dtype=torch.float64, device="cpu")
            values = values.log() if positive else values
            squares = float((values - values.mean()).square().sum())
            parts.append((squares * (len(group) - 1) / len(group), len(group) - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return point, point
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    reach = min(_student(0.5 + level / 2, freedom) * variance**0.5, _LARGEST_REACH)
    if positive:
        return point * math.exp(-reach), point * math.exp(reach)
    return max(point - reach, 0.0), point + reach


def _student(share: float, freedom: float) -> float:
    """A quantile of Student's t, for at least one degree of freedom.

    That of one degree in closed form, else its expansion around the normal's (Abramowitz and Stegun
    26.7.5): 3% too small at two degrees for a share of 0.975, 1% at three.
    """
    if freedom < 1.5:
        return math.tan(math.pi * (share - 0.5))
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def random_coupling(
    spectrum: Spectrum, rank: int, size: int, length: float, quantile: float
) -> float:
    """A quantile of ‖F^{1/2} P r‖ for random directions r of a given length.

    Args:
        spectrum: of the safety curvature.
        rank: k.
        size: number of parameters n.
        length: ‖r‖.
        quantile: between 0 and 1.
    """
    k = spectrum.rank(rank)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        _RANDOM_DIRECTIONS, k, generator=generator, dtype=torch.float64, device="cpu"
    )
    sizes = (spectrum.eigenvalues[:k].sqrt() * noise).norm(dim=1) * length / size**0.5
    return float(sizes.quantile(quantile))


def judge(
    evidence: Evidence,
    rank: int,
    point: Figures,
    spread: dict[str, tuple[float, float]],
    thresholds: Thresholds,
) -> tuple[Condition, Condition, Condition]:
    """Compare the figures with the thresholds: the three conditions in the paper's order."""
    random = random_coupling(
        Spectrum.of(evidence.gram),
        rank,
        evidence.size,
        evidence.bending_norm,
        thresholds.coupling_quantile,
    )
    below, above = (lambda x, bound: x <= bound), (lambda x, bound: x > bound)
    return (
        _condition("low_rank_sensitivity", "tail", point, spread, thresholds.tail, below),
        _condition("initial_orthogonality", "overlap", point, spread, thresholds.overlap, below),
        _condition("curvature_coupling", "coupling", point, spread, random, above),
    )


def _condition(
    name: str,
    figure: str,
    point: Figures,
    spread: dict[str, tuple[float, float]],
    threshold: float,
    side: Callable[[float, float], bool],
) -> Condition:
    value, interval = getattr(point, figure), spread[figure]
    holds = side(value, threshold)
    certain = all(side(end, threshold) == holds for end in interval)
    return Condition(name, value, interval, threshold, holds, certain)
