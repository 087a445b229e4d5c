r"""Following the top eigenspace of a curvature while its parameters change.

An eigenbasis U, Λ of an earlier point is tested on the present curvature H, usually that of a few
fresh examples, with one or two products. For random signs ε_i let w = Σ_i ε_i u_i/λ_i. Then

    E ‖(I − UUᵀ) H w‖² = Σ_i ‖(I − UUᵀ) H u_i‖²/λ_i²,      E ‖UUᵀ H w‖² = Σ_i ‖UUᵀ H u_i‖²/λ_i²

and the drift is the square root of their ratio: the size of what leaves the subspace against what
stays. Near an invariant subspace it is the root mean square of the relative residuals ‖r_i‖/|λ_i|;
a rotation inside of the subspace is no drift, nor is curvature that grows there. By the drift the
basis is kept, updated by Lanczos from Σ_i u_i (`safeopt.curvature.krylov`), or computed anew.

A basis that is kept keeps its eigenvalues. Present ones take k products: what two say of u_iᵀHu_i
holds the other directions' share of H w, divided by their smaller eigenvalues. Over two decades of
eigenvalues (k = 8) a rotation by 2% leaves the top one right to 1%, and that estimate of it wrong
by 47%.

What to expect: an update that ends with known residuals takes k products at least, since each
vector must be multiplied once, and Lanczos from a random vector took 2k to 5k (k = 8, residual
1e-3), so that a warm start can save half to three quarters at most. The larger saving is the test:
two products on a few examples instead of an update that was not needed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from safeopt.curvature.krylov import Eigenpairs, Which, lanczos
from safeopt.curvature.rowspace import RowSpace, SymmetricOperator
from safeopt.rows import mixed

logger = logging.getLogger("safeopt")

Action = Literal["kept", "updated", "cold"]


@dataclass
class TrackingCounts:
    """Matrix-vector products so far, by what they were for.

    Attributes:
        test: drift tests; these are usually products of a few examples.
        warm: updates from an earlier basis.
        cold: starts from random vectors.
    """

    test: int = 0
    warm: int = 0
    cold: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters as plain numbers."""
        return asdict(self)


def drift(
    operator: SymmetricOperator, pairs: Eigenpairs, products: int = 2, seed: int = 0
) -> float:
    """Estimate how far an earlier eigenspace is from one of the operator.

    Args:
        operator: H, at the present parameters.
        pairs: U and Λ of an earlier point.
        products: random combinations of the eigenvectors to multiply, at least 1; their mean square
            counts.
        seed: of the signs.

    Returns:
        0 where the space is still invariant, 1 where as much leaves it as stays, infinity where H
        maps it to nothing of itself. Pairs with λ = 0 to rounding are left out; where all are,
        infinity unless H still maps them to zero.

    Raises:
        ValueError: if ``products`` is smaller than 1.
    """
    if products < 1:
        raise ValueError(f"products={products}: at least one combination of the eigenvectors")
    values = pairs.eigenvalues
    space = RowSpace(operator, seed)
    # A residual at rounding level counts as converged; of smaller eigenvalues it is a large share.
    live = (values.abs() > 10 * space.rounding(values)).nonzero().squeeze(1)
    if zero := not len(live):
        live, values = torch.arange(len(values), device="cpu"), torch.ones_like(values)
    basis = space.flat(pairs.basis.blocks)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (products, len(live)), generator=generator, device="cpu") * 2.0 - 1
    mix = torch.zeros(products, len(values), dtype=torch.float64, device="cpu")
    mix[:, live] = signs.double() / values[live].cpu()
    with operator.retained():
        image = space.products(mixed(mix, basis))
    inside = float(torch.linalg.vector_norm(space.remove(image, basis)))
    outside = float(torch.linalg.vector_norm(image, dtype=torch.float64))
    if zero:
        return math.inf if inside or outside else 0.0
    return outside / inside if inside > 0 else math.inf


class EigenspaceTracker:
    """The top eigenpairs of a curvature that changes, computed again only as far as needed.

    >>> from safeopt.curvature.tracking import EigenspaceTracker
    >>> tracker = EigenspaceTracker(rank=8)
    >>> tracker.counts.as_dict()
    {'test': 0, 'warm': 0, 'cold': 0}

    Args:
        rank: number of eigenpairs k.
        which: ``"magnitude"`` for the largest |λ|, ``"largest"`` for the largest λ.
        tolerance: largest relative residual after an update.
        keep_below: drift up to which the old basis is kept; at least 0.
        cold_above: drift from which the old basis is not worth starting from; not below
            ``keep_below``.
        test_products: products of a test, at least 1.
        seed: of random vectors.

    Attributes:
        pairs: the eigenpairs of the last update that did not keep them, None before the first.
        counts: products by kind.

    Raises:
        ValueError: if a threshold or ``test_products`` is out of its range; of `lanczos`, in
            `update`.
    """

    def __init__(
        self,
        rank: int,
        *,
        which: Which = "magnitude",
        tolerance: float = 1e-3,
        keep_below: float = 0.1,
        cold_above: float = 0.5,
        test_products: int = 2,
        seed: int = 0,
    ) -> None:
        if not 0 <= keep_below <= cold_above:
            raise ValueError(
                f"keep_below={keep_below}, cold_above={cold_above}: expected "
                "0 <= keep_below <= cold_above"
            )
        if test_products < 1:
            raise ValueError(f"test_products={test_products}: a test takes at least one product")
        self.rank = rank
        self.which: Which = which
        self.tolerance = tolerance
        self.keep_below = keep_below
        self.cold_above = cold_above
        self.test_products = test_products
        self.seed = seed
        self.pairs: Eigenpairs | None = None
        self.counts = TrackingCounts()

    def update(
        self, operator: SymmetricOperator, fresh: SymmetricOperator | None = None
    ) -> tuple[Action, float | None]:
        """Make `pairs` eigenpairs of the operator, or find that they still span nearly its space.

        Args:
            operator: the curvature at the present parameters.
            fresh: the same on other, fewer examples, for the test; ``operator`` itself by default.

        Returns:
            What was done, and the drift; None at the first call.

        Cost: ``test_products`` products of ``fresh``; where the basis is not kept, those of
        `lanczos` with ``operator``.
        """
        if self.pairs is None:
            self._solve(operator, warm=False)
            return "cold", None
        found = drift(
            operator if fresh is None else fresh,
            self.pairs,
            self.test_products,
            self.seed + self.counts.test,  # what one test's signs hide the next one's may show
        )
        self.counts.test += self.test_products
        if found <= self.keep_below:
            return "kept", found
        warm = found < self.cold_above
        logger.info("eigenspace drift %.2f: %s start", found, "warm" if warm else "cold")
        self._solve(operator, warm=warm)
        return ("updated" if warm else "cold"), found

    def _solve(self, operator: SymmetricOperator, *, warm: bool) -> None:
        start = self.pairs.basis if warm and self.pairs is not None else None
        self.pairs = lanczos(
            operator, self.rank, which=self.which, tolerance=self.tolerance, start=start,
            seed=self.seed,
        )  # fmt: skip
        if warm:
            self.counts.warm += self.pairs.products
        else:
            self.counts.cold += self.pairs.products
