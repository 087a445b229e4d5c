"""Trace and spectral density of a symmetric operator H from a few products.

Stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; Ubaru, Chen and
Saad 2017): m steps of Lanczos from a random unit vector give the Gauss quadrature of the spectral
measure seen from it, nodes θ_j (Ritz values) with weights τ_j² (squared first components of their
eigenvectors). The mean over random vectors estimates the density of eigenvalues,
φ(x) = (1/n) Σ_i δ(x − λ_i).

Hutch++ (Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649) splits the trace into that on a
sketched range Q, which is exact, and the rest, which Hutchinson's estimator sees:
tr H ≈ tr(QHQᵀ) + (1/l) Σ_j g_jᵀ(I − QᵀQ)H(I − QᵀQ)g_j. A matrix with few large eigenvalues, as
curvatures are, leaves little to the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.basis import inner_products
from safeopt.curvature.rowspace import RowSpace, SymmetricOperator


@dataclass(frozen=True)
class TraceEstimate:
    """A trace and how sure it is.

    Attributes:
        value: the estimate.
        standard_error: of the random part; nan with a single random vector.
        products: matrix-vector products spent.
    """

    value: float
    standard_error: float
    products: int


def hutch_pp(operator: SymmetricOperator, products: int = 48, *, seed: int = 0) -> TraceEstimate:
    """Estimate tr H by Hutch++.

    Args:
        operator: the matrix.
        products: products to spend: a third each for the sketch, its image and the rest; at
            least 3. With 3n or more the result is exact.
        seed: seed of the random vectors.

    Raises:
        ValueError: if ``products`` is smaller than 3.

    Memory: about ``products``·n numbers.
    """
    if products < 3:
        raise ValueError(f"products={products}: Hutch++ needs at least 3")
    space = RowSpace(operator, seed)
    sketched = min(products // 3, space.size)
    with operator.retained():
        if sketched == space.size:  # signs as many may depend on one another
            q = space.orthonormal(space.random(sketched), space.empty())
            return TraceEstimate(_trace(space, q), 0.0, space.spent)
        q = space.orthonormal(space.products(space.signs(sketched)), space.empty())
        exact = _trace(space, q) if len(q) else 0.0
        rest = space.signs(products - 2 * sketched)
        if len(q):
            space.remove(rest, q)
        samples = _row_products(rest, space.products(rest))
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return TraceEstimate(exact + float(samples.mean()), error, space.spent)


def _trace(space: RowSpace, q: Tensor) -> float:
    """tr(QHQᵀ): one product for each row of an orthonormal basis."""
    return float(inner_products([q], [space.products(q)]).trace())


@dataclass(frozen=True)
class SpectralDensity:
    """The density of eigenvalues as weighted points.

    Attributes:
        nodes: Ritz values, shape ``(v, m)``, float64, for v random vectors.
        weights: their weights, same shape; each row sums to 1.
        products: matrix-vector products spent.
    """

    nodes: Tensor
    weights: Tensor
    products: int

    def moment(self, power: int) -> float:
        """Return the estimate of tr(H^power)/n."""
        return float((self.weights * self.nodes**power).sum(1).mean())

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """Return φ convolved with a Gaussian of standard deviation ``width``.

        Args:
            grid: where to evaluate, shape ``(g,)``.
            width: in units of the eigenvalues, positive.

        Returns:
            Shape ``(g,)``, float64; its integral is 1.
        """
        distance = (grid.double().unsqueeze(1) - self.nodes.flatten()) / width
        kernel = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
        return kernel @ (self.weights.flatten() / len(self.weights))


def spectral_density(
    operator: SymmetricOperator, *, steps: int = 32, vectors: int = 4, seed: int = 0
) -> SpectralDensity:
    """Estimate the density of eigenvalues by stochastic Lanczos quadrature.

    Args:
        operator: the matrix.
        steps: Lanczos steps m for each vector, at least 1.
        vectors: number of random vectors, at least 1.
        seed: seed of the random vectors.

    Raises:
        ValueError: if ``steps`` or ``vectors`` is smaller than 1.

    Cost: ``steps``·``vectors`` products. Memory: ``steps``·n numbers.
    """
    if steps < 1 or vectors < 1:
        raise ValueError(f"steps={steps}, vectors={vectors}: at least one of each")
    space = RowSpace(operator, seed)
    steps = min(steps, space.size)
    nodes = torch.zeros(vectors, steps, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(nodes)
    with operator.retained():
        for sample in range(vectors):
            values, first = _quadrature(space, steps)
            nodes[sample, : len(values)] = values
            weights[sample, : len(values)] = first
    return SpectralDensity(nodes, weights, space.spent)


def _quadrature(space: RowSpace, steps: int) -> tuple[Tensor, Tensor]:
    v = space.empty(steps)
    v[:1] = space.orthonormal(space.random(1), v[:0])
    t = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    for j in range(steps):
        w = space.products(v[j : j + 1])
        row = space.remove(w, v[: j + 1])[0].cpu()
        t[j, : j + 1] = row
        t[: j + 1, j] = row
        beta = float(torch.linalg.vector_norm(w, dtype=torch.float64))
        if j + 1 == steps or beta <= space.rounding(t.abs().max()):
            values, vectors = torch.linalg.eigh(t[: j + 1, : j + 1])
            return values, vectors[0].square()
        v[j + 1] = w[0] / beta
    raise AssertionError("unreachable: the last step returns")


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of corresponding rows, float64, on the CPU."""
    return (left.double() * right.double()).sum(1).cpu()
