"""Hutch++ and stochastic Lanczos quadrature against dense matrices."""

import pytest
import torch
from test_krylov import SIZE, Dense, decaying, matrix_of
from tolerances import ORTHONORMAL

from safeopt.curvature.density import hutch_pp, spectral_density
from safeopt.curvature.rowspace import RowSpace


def test_trace_of_a_low_rank_matrix_is_exact():
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:5] = torch.tensor([5.0, -3.0, 2.0, 1.0, 0.5])
    operator = Dense(matrix_of(values)[0])
    estimate = hutch_pp(operator, 18)
    assert abs(estimate.value - 5.5) < 1e-10
    assert estimate.standard_error < 1e-10
    # The sketch has only five directions.
    assert estimate.products == operator.products == operator.shared == 17


def test_trace_of_a_small_matrix_is_exact():
    values = torch.arange(1, 6).double()
    estimate = hutch_pp(Dense(matrix_of(values)[0], [(5,)]), 30)
    assert abs(estimate.value - 15) < 1e-12
    assert estimate.standard_error == 0


def test_the_trace_is_exact_whatever_the_seed():
    """Five random sign vectors of five entries depend on one another for one seed in eight."""
    operator = Dense(matrix_of(torch.arange(1, 6).double())[0], [(5,)])
    found = [hutch_pp(operator, 15, seed=seed).value for seed in range(40)]
    assert max(abs(value - 15) for value in found) < 1e-12
    assert hutch_pp(Dense(torch.zeros(9, 9, dtype=torch.float64), [(9,)]), 6).value == 0


def test_a_sketch_that_sees_nothing_is_no_zero_trace():
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    found = [hutch_pp(Dense(matrix, [(6,)]), 9, seed=seed) for seed in range(40)]
    assert all(estimate.value != 0 or estimate.standard_error >= 0 for estimate in found)
    assert sum(estimate.value for estimate in found) / 40 == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("ratio", [0.25, 0.1])
def test_a_sketch_of_nearly_dependent_products(ratio):
    """Eigenvalues that fall fast: the sketch's rows differ by little more than their rounding."""
    values = ratio ** torch.arange(SIZE).double()
    for seed in range(4):
        operator = Dense(matrix_of(values)[0], dtype=torch.float32)
        space = RowSpace(operator, seed)
        q = space.orthonormal(space.products(space.signs(16)), space.empty())
        assert (q @ q.T - torch.eye(len(q))).abs().max() < ORTHONORMAL[torch.float32]
        estimate = hutch_pp(operator, 48, seed=seed)
        assert estimate.value == pytest.approx(float(values.sum()), rel=1e-5)


def test_trace_error_is_what_it_says():
    """Over many seeds: unbiased, and the stated error is the scatter; better than Hutchinson."""
    values = decaying()
    operator = Dense(matrix_of(values)[0])
    estimates = [hutch_pp(operator, 30, seed=seed) for seed in range(200)]
    errors = torch.tensor([e.value for e in estimates]).double() - values.sum()
    stated = torch.tensor([e.standard_error for e in estimates]).double()
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 200**0.5
    assert 0.8 < float(errors.std() / stated.square().mean().sqrt()) < 1.25
    off_diagonal = operator.matrix - operator.matrix.diagonal().diag()
    hutchinson = (2 * off_diagonal.square().sum() / 30).sqrt()
    assert float(errors.std()) < 0.5 * float(hutchinson)


def test_trace_is_deterministic_and_checks_its_budget():
    operator = Dense(matrix_of(decaying())[0])
    assert hutch_pp(operator, 12, seed=1) == hutch_pp(operator, 12, seed=1)
    assert hutch_pp(operator, 12, seed=1) != hutch_pp(operator, 12, seed=2)
    with pytest.raises(ValueError, match="products=2"):
        hutch_pp(operator, 2)


def test_density_moments():
    """m steps integrate polynomials of degree 2m − 1 exactly, for each random vector."""
    values = decaying(indefinite=True)
    matrix = matrix_of(values)[0]
    operator = Dense(matrix)
    density = spectral_density(operator, steps=5, vectors=3, seed=2)
    assert density.products == operator.shared == 15
    assert (density.weights.sum(1) - 1).abs().max() < 1e-12
    for sample in range(3):
        generator = torch.Generator().manual_seed(2)
        z = [torch.randn(1, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]
        z = z[sample][0] / z[sample].norm()
        for power in range(10):
            expected = z @ torch.linalg.matrix_power(matrix, power) @ z
            actual = (density.weights[sample] * density.nodes[sample] ** power).sum()
            assert abs(float(actual - expected)) < 1e-10


def test_density_is_near_the_histogram():
    values = torch.cat([torch.linspace(-1, 1, 95), torch.linspace(4, 5, 5)]).double()
    density = spectral_density(Dense(matrix_of(values)[0]), steps=40, vectors=20)
    grid = torch.linspace(-3, 8, 2000, dtype=torch.float64)
    smooth = density.smoothed(grid, 0.3)
    assert abs(float(torch.trapezoid(smooth, grid)) - 1) < 1e-3
    above = grid > 3
    assert abs(float(torch.trapezoid(smooth[above], grid[above])) - 0.05) < 0.03
    exact = torch.exp(-0.5 * ((grid[:, None] - values) / 0.3) ** 2).mean(1) / (0.3 * 6.283185**0.5)
    assert float((smooth - exact).abs().mean()) < 0.1 * float(exact.mean())
    assert abs(density.moment(1) - float(values.mean())) < 0.1


def test_density_of_degenerate_matrices():
    density = spectral_density(Dense(torch.eye(SIZE) * 2), steps=6, vectors=2)
    assert density.products == 2  # the first step finds an invariant space
    assert abs(density.moment(3) - 8) < 1e-12
    projector = matrix_of(torch.cat([torch.ones(60), torch.zeros(40)]).double())[0]
    density = spectral_density(Dense(projector), steps=6, vectors=2)
    assert density.products == 4  # rounding is no further direction
    assert density.moment(1) == pytest.approx(0.6, abs=0.1)
    assert spectral_density(Dense(torch.ones(1, 1), [()]), steps=6).moment(1) == pytest.approx(1)
    for options in ({"steps": 0}, {"vectors": 0}):
        with pytest.raises(ValueError, match="at least one"):
            spectral_density(Dense(torch.eye(SIZE)), **options)
