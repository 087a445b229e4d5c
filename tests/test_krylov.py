"""Eigensolvers against dense linear algebra, their counts of products, and warm starts."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EIGENVALUE, ORTHONORMAL, relative_error

from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.krylov import block_krylov, lanczos
from safeopt.curvature.rowspace import RowSpace

SHAPES = [(4, 9), (7,), (), (3, 2, 5), (26,)]
SIZE = 100
SOLVERS = {"lanczos": lanczos, "block_krylov": block_krylov}
ANGLE = 1e-5


class Dense:
    """A symmetric matrix as an operator, which counts its products and those inside `retained`."""

    dtype = torch.float64
    device = torch.device("cpu")

    def __init__(self, matrix, shapes=SHAPES, dtype=torch.float64):
        self.matrix = matrix.to(dtype)
        self.dtype = dtype
        self.shapes = [torch.Size(s) for s in shapes]
        self.products = self.shared = 0
        self.kept = False

    def matmat(self, vectors):
        flat = torch.cat([x.reshape(len(x), -1) for x in vectors], dim=1)
        self.products += len(flat)
        self.shared += self.kept * len(flat)
        parts = (flat @ self.matrix).split([s.numel() for s in self.shapes], dim=1)
        return [p.reshape(len(flat), *s) for p, s in zip(parts, self.shapes, strict=True)]

    @contextmanager
    def retained(self):
        self.kept = True
        yield
        self.kept = False


@contextmanager
def rounded_products():
    """float32 products in bfloat16, as training may want them; CPUs that can do so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            backend.matmul.fp32_precision = "none"  # that has set it; it followed the general one


def matrix_of(values, seed=0):
    """A random symmetric matrix with the given eigenvalues, and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q @ torch.diag(values) @ q.T, q.T


def decaying(count=SIZE, *, indefinite=False):
    """Eigenvalues 1/j, every third one negative if ``indefinite``."""
    values = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    if indefinite:
        values[1::3] *= -1
    return values


def flat(basis):
    return torch.cat([b.double().reshape(len(b), -1) for b in basis.blocks], dim=1)


def as_basis(rows, shapes=SHAPES, dtype=torch.float64):
    sizes = [torch.Size(s).numel() for s in shapes]
    parts = rows.to(dtype).split(sizes, dim=1)
    return DenseBasis([p.reshape(len(rows), *s) for p, s in zip(parts, shapes, strict=True)])


def subspace_angle(left, right):
    """Sine of the largest angle between two row spaces with orthonormal rows."""
    return float(torch.linalg.matrix_norm(left - left @ right.T @ right, 2))


def check(result, operator, expected, tolerance, *, angle=ANGLE, error=None):
    assert result.converged
    assert result.products == operator.products == operator.shared
    values, vectors = expected
    gap = (result.eigenvalues - values).abs() / values.abs()
    assert gap.max() < (error or EIGENVALUE[operator.dtype])
    u = flat(result.basis)
    assert (u @ u.T - torch.eye(len(u), dtype=u.dtype)).abs().max() < ORTHONORMAL[operator.dtype]
    assert subspace_angle(u, vectors) < angle
    true = torch.linalg.vector_norm(
        u @ operator.matrix.double() - result.eigenvalues[:, None] * u, dim=1
    )
    slack = 1e-5 if operator.dtype == torch.float32 else 1e-13
    assert (true - result.residuals).abs().max() < slack
    assert (result.residuals <= tolerance * result.eigenvalues.abs() + slack).all()


def top(values, vectors, rank, which):
    order = (values.abs() if which == "magnitude" else values).argsort(descending=True)[:rank]
    return values[order], vectors[order]


@pytest.mark.parametrize("which", ["magnitude", "largest"])
@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_dense_eigenpairs(solver, rank, indefinite, which):
    values = decaying(indefinite=indefinite)
    matrix, vectors = matrix_of(values)
    operator = Dense(matrix)
    result = SOLVERS[solver](operator, rank, which=which, tolerance=1e-7)
    check(result, operator, top(values, vectors, rank, which), 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32(solver):
    values = decaying()
    matrix, vectors = matrix_of(values)
    operator = Dense(matrix, dtype=torch.float32)
    result = SOLVERS[solver](operator, 6, tolerance=1e-3)
    check(result, operator, top(values, vectors, 6, "magnitude"), 1e-3, angle=0.05)
    assert {b.dtype for b in result.basis.blocks} == {torch.float32}
    assert [b.shape[1:] for b in result.basis.blocks] == operator.shapes


@pytest.mark.parametrize("solver", SOLVERS)
def test_smallest_subspace_restarts_often_and_still_converges(solver):
    values = decaying()
    matrix, vectors = matrix_of(values)
    subspace = {"lanczos": 9, "block_krylov": 12}[solver]
    operator = Dense(matrix)
    result = SOLVERS[solver](operator, 6, tolerance=1e-7, subspace=subspace, max_products=2000)
    assert result.products > 2 * subspace
    check(result, operator, top(values, vectors, 6, "magnitude"), 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_restarting_costs_few_products(solver):
    """Thick restart keeps what was found: not many more products than with all vectors kept."""
    matrix, _ = matrix_of(decaying())
    counts = [
        SOLVERS[solver](Dense(matrix), 6, tolerance=1e-6, subspace=subspace).products
        for subspace in (32, SIZE)
    ]
    assert counts[1] <= counts[0] <= 1.5 * counts[1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_low_rank_matrix(solver):
    """Fewer nonzero eigenvalues than asked for: the rest are zero, not noise."""
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:3] = torch.tensor([5.0, 2.0, -1.0])
    matrix, vectors = matrix_of(values)
    result = SOLVERS[solver](Dense(matrix), 6)
    assert result.converged
    assert (result.eigenvalues[:3] - torch.tensor([5.0, 2.0, -1.0])).abs().max() < 1e-10
    assert result.eigenvalues[3:].abs().max() < 1e-10
    assert subspace_angle(vectors[:3], flat(result.basis)) < ANGLE
    u = flat(result.basis)
    assert (u @ u.T - torch.eye(6)).abs().max() < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_matrix(solver):
    result = SOLVERS[solver](Dense(torch.zeros(SIZE, SIZE)), 3)
    assert result.converged
    assert float(result.eigenvalues.abs().max()) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_whole_space(solver, size):
    """More eigenpairs than dimensions: all of them."""
    values = torch.arange(size, 0, -1, dtype=torch.float64)
    matrix, _ = matrix_of(values)
    result = SOLVERS[solver](Dense(matrix, [(size,)]), 8, tolerance=1e-9)
    assert result.basis.rank == size
    assert (result.eigenvalues - values).abs().max() < 1e-10


def test_multiple_eigenvalue_needs_the_block():
    values = torch.cat([torch.full((4,), 2.0), 1 / torch.arange(1, 97)]).double()
    matrix, vectors = matrix_of(values)
    result = block_krylov(Dense(matrix), 4, tolerance=1e-8, block=4)
    assert (result.eigenvalues - 2).abs().max() < 1e-10
    assert subspace_angle(flat(result.basis), vectors[:4]) < ANGLE


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_seeds_give_equal_results(solver):
    matrix, _ = matrix_of(decaying())
    results = [SOLVERS[solver](Dense(matrix), 4, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(flat(results[0].basis), flat(results[1].basis))
    assert torch.equal(results[0].residuals, results[1].residuals)
    assert not torch.equal(flat(results[0].basis), flat(results[2].basis))


@pytest.mark.parametrize("solver", SOLVERS)
def test_gives_up_and_says_so(solver, caplog):
    matrix, _ = matrix_of(decaying())
    operator = Dense(matrix)
    result = SOLVERS[solver](operator, 6, tolerance=1e-9, max_products=12)
    assert not result.converged
    assert operator.products == result.products == 12
    assert "not converged" in caplog.text
    assert result.residuals.max() > 1e-9


def test_fewer_pairs_than_asked_for_have_not_converged(caplog):
    """On the identity every pair that was found is exact."""
    result = lanczos(Dense(torch.eye(SIZE)), 6, max_products=4)
    assert len(result.eigenvalues) == result.basis.rank == 4
    assert not result.converged
    assert "2 of 6 eigenpairs have not converged" in caplog.text


def drifted(size, seed=1, count=SIZE):
    """A matrix whose eigenvectors have turned by about ``size``, and the old top eigenvectors."""
    values = decaying(count)
    matrix, vectors = matrix_of(values)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(count, count, generator=generator, dtype=torch.float64)
    turn = torch.linalg.matrix_exp(size * (turn - turn.T) / (2 * count) ** 0.5)
    return turn @ matrix @ turn.T, vectors @ turn.T, values, as_basis(vectors[:6])


@pytest.mark.parametrize("solver", SOLVERS)
def test_warm_start_spends_fewer_products(solver):
    matrix, vectors, values, old = drifted(0.01)
    cold = SOLVERS[solver](Dense(matrix), 6)
    operator = Dense(matrix)
    warm = SOLVERS[solver](operator, 6, start=old)
    check(warm, operator, (values[:6], vectors[:6]), 1e-3, angle=0.02, error=1e-5)
    assert cold.cold
    assert not warm.cold
    assert warm.products <= 0.7 * cold.products


def test_unchanged_basis_costs_one_product_a_direction():
    matrix, vectors = matrix_of(decaying())
    result = block_krylov(Dense(matrix), 6, start=as_basis(vectors[:6]))
    assert result.products == 6
    assert not result.cold


def test_useless_basis_leads_to_a_cold_start():
    """Directions with tiny curvature: nothing to start from."""
    matrix, vectors = matrix_of(decaying())
    generator = torch.Generator().manual_seed(9)
    noise = torch.linalg.qr(torch.randn(SIZE, 6, generator=generator, dtype=torch.float64))[0].T
    result = block_krylov(Dense(matrix), 6, start=as_basis(noise))
    assert result.cold
    assert result.converged
    assert subspace_angle(flat(result.basis), vectors[:6]) < 0.02


def test_a_basis_with_one_direction_of_use_is_kept():
    values = decaying()
    matrix, vectors = matrix_of(values)
    generator = torch.Generator().manual_seed(9)
    rows = torch.cat([vectors[:1], torch.randn(5, SIZE, generator=generator).double()])
    operator = Dense(matrix)
    result = block_krylov(operator, 6, start=as_basis(torch.linalg.qr(rows.T).Q.T))
    check(result, operator, (values[:6], vectors[:6]), 1e-3, angle=0.02, error=1e-5)
    assert not result.cold


def test_a_basis_is_judged_by_itself():
    """Not by the space that has grown from it, whose best pair may be another, far from exact."""
    matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor([[1.0, 0.4, 0.0], [0.4, -1.6, 1.2], [0.0, 1.2, 0.0]])
    operator = Dense(matrix)
    result = block_krylov(operator, 1, start=as_basis(torch.eye(1, SIZE)))
    assert not result.cold
    assert result.products == operator.products == 3


@pytest.mark.parametrize("count", [2, 9, 30])
def test_start_of_another_rank(count):
    values = decaying()
    matrix, vectors = matrix_of(values)
    operator = Dense(matrix)
    result = block_krylov(operator, 6, start=as_basis(vectors[:count]), tolerance=1e-7)
    check(result, operator, (values[:6], vectors[:6]), 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_without_a_direction(solver):
    values = decaying()
    matrix, vectors = matrix_of(values)
    operator = Dense(matrix)
    result = SOLVERS[solver](operator, 6, start=as_basis(vectors[:0]))
    check(result, operator, (values[:6], vectors[:6]), 1e-3, angle=0.02, error=1e-5)
    assert result.cold


def test_dependent_start_vectors():
    values = decaying()
    matrix, vectors = matrix_of(values)
    start = as_basis(torch.cat([vectors[:3], vectors[:3]]))
    result = block_krylov(Dense(matrix), 6, start=start, tolerance=1e-7)
    assert (result.eigenvalues - values[:6]).abs().max() < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_invariant_start_is_left_by_random_vectors(solver):
    """What rounding leaves of the products lies in the space that there is already."""
    values = decaying()
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    eye = torch.eye(SIZE, dtype=torch.float64)
    operator = Dense(torch.diag(values))
    result = SOLVERS[solver](operator, 6, start=as_basis(turn @ eye[:2]), tolerance=1e-7)
    check(result, operator, (values[:6], eye[:6]), 1e-7)


def test_short_and_nearly_dependent_rows_are_made_orthonormal():
    """Residuals are: a millionth of an eigenvalue long, and nearly in the space that they leave."""
    space = RowSpace(Dense(torch.eye(SIZE), dtype=torch.float32), 0)
    basis = space.orthonormal(space.random(6), space.empty())
    apart = space.orthonormal(space.random(3), basis)
    rows = 1e-9 * (basis[:3] + 1e-3 * apart)
    found = space.orthonormal(rows, basis)
    assert len(found) == 3
    whole = torch.cat([basis, found]).double()
    assert (whole @ whole.T - torch.eye(9)).abs().max() < 2e-7
    assert relative_error(found, apart) < 1e-3


def test_more_vectors_at_a_time_than_are_kept():
    values = decaying()
    matrix, vectors = matrix_of(values)
    operator = Dense(matrix)
    result = block_krylov(operator, 1, block=8, tolerance=1e-7)
    check(result, operator, (values[:1], vectors[:1]), 1e-7)


def test_rounded_products_of_training_are_not_used():
    """The eigenvectors are orthonormal and their residuals true."""
    values = torch.linspace(0, 1, 40_000)
    values[-6:] = torch.arange(5.0, 11)

    class Diagonal(Dense):
        def matmat(self, vectors):
            self.products += len(vectors[0])
            return [vectors[0] * self.matrix]

    operator = Diagonal(values, [(40_000,)], torch.float32)
    with rounded_products():
        result = block_krylov(operator, 6, tolerance=1e-4)
    assert result.converged
    u = result.basis.blocks[0].double()
    assert (u @ u.T - torch.eye(6, dtype=u.dtype)).abs().max() < ORTHONORMAL[torch.float32]
    errors = (u * values - result.eigenvalues.unsqueeze(1) * u).norm(dim=1)
    assert (errors <= 1.01e-4 * result.eigenvalues).all()


def test_smaller_blocks_spend_fewer_products():
    matrix, _ = matrix_of(decaying())
    counts = [block_krylov(Dense(matrix), 6, block=block).products for block in (1, 2, 6)]
    assert counts[0] < counts[1] < counts[2]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rank=st.integers(1, 7),
    which=st.sampled_from(["magnitude", "largest"]),
    solver=st.sampled_from(sorted(SOLVERS)),
)
def test_random_matrices(seed, rank, which, solver):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(30, generator=generator, dtype=torch.float64)
    matrix, _ = matrix_of(values, seed)
    result = SOLVERS[solver](
        Dense(matrix, [(5, 6)]), rank, which=which, tolerance=1e-8, seed=seed, max_products=2000
    )
    order = (values.abs() if which == "magnitude" else values).sort(descending=True).indices
    assert (result.eigenvalues - values[order[:rank]]).abs().max() < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
def test_errors_name_the_argument(solver):
    operator = Dense(torch.eye(SIZE))
    for options, text in (
        ({"rank": 0}, "rank=0"),
        ({"rank": 3, "which": "top"}, 'which="top"'),
        ({"rank": 3, "tolerance": 0.0}, "tolerance=0.0"),
        ({"rank": 8, "subspace": 9}, "subspace=9"),
        ({"rank": 3, "subspace": 0}, "subspace=0"),
        ({"rank": 3, "max_products": 0}, "max_products=0"),
        ({"rank": 3, "start": as_basis(torch.eye(2, 9), [(9,)])}, "start: a basis over 1 param"),
    ):
        with pytest.raises(ValueError, match=text):
            SOLVERS[solver](operator, **options)
    with pytest.raises(ValueError, match="block=-1"):
        block_krylov(operator, 3, block=-1)
    operator.matrix = torch.full((SIZE, SIZE), float("nan"), dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        SOLVERS[solver](operator, 3)
