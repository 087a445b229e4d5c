"""The safety subspace against dense float64 linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EIGENVALUE, ORTHONORMAL, relative_error

from safeopt.curvature.basis import DenseBasis, inner_products
from safeopt.curvature.solvers import gram
from safeopt.curvature.subspace import updated_subspace

SHAPES = [(5,), (3, 4), (2, 2, 3), (1,)]
SIZE = 30


def random_rows(count, seed=0, dtype=torch.float64):
    """G: gradients of ``count`` examples whose lengths differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(0, -2, count, dtype=torch.float64)
    rows = [torch.randn(count, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [(r * lengths.view(-1, *[1] * (r.dim() - 1))).to(dtype) for r in rows]


def random_params(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def dense(rows):
    """One matrix of all parameters, (m, n), float64."""
    return torch.cat([row.double().flatten(1) for row in rows], dim=1)


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def projector(basis):
    u = dense(basis.blocks)
    return u.T @ u


def identity_error(basis):
    u = dense(basis.blocks)
    return float((u @ u.T - torch.eye(len(u), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "rank"), [(6, 6), (6, 3), (6, 1), (12, 12), (20, 8)])
def test_gram_equals_dense_eigenpairs(count, rank, dtype):
    rows = random_rows(count, dtype=dtype)
    values, basis = gram(rows, rank)
    fisher = dense(rows).T @ dense(rows)
    all_values, vectors = torch.linalg.eigh(fisher)
    expected = all_values.flip(0)[:rank]
    assert values.dtype == torch.float64
    assert ((values - expected).abs() / expected).max() < EIGENVALUE[dtype]
    assert identity_error(basis) < ORTHONORMAL[dtype]
    top = vectors.flip(1)[:, :rank]
    assert (projector(basis) - top @ top.T).abs().max() < 10 * EIGENVALUE[dtype]
    u = dense(basis.blocks)
    assert (u @ fisher @ u.T - values.diag()).abs().max() < EIGENVALUE[dtype] * expected[0]


def test_gram_keeps_the_rows_dtype_and_shapes():
    for dtype in (torch.float32, torch.float64):
        _, basis = gram(random_rows(5, dtype=dtype), 4)
        assert [tuple(b.shape) for b in basis.blocks] == [(4, *s) for s in SHAPES]
        assert {b.dtype for b in basis.blocks} == {dtype}
        assert basis.rank == 4
        assert basis.nbytes == 4 * SIZE * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_rows(dtype):
    rows = random_rows(4, dtype=dtype)
    for repeated in (
        [torch.cat([r, r, -2 * r]) for r in rows],
        [torch.cat([r, torch.zeros_like(r)]) for r in rows],
        [torch.cat([r, r.sum(0, keepdim=True)]) for r in rows],
    ):
        values, basis = gram(repeated, 32)
        assert len(values) == basis.rank == 4
        assert identity_error(basis) < ORTHONORMAL[dtype]


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_rank_deficient_rows_of_two_dtypes(first):
    """What float32 has rounded is no direction, wherever its parameter stands."""
    dtypes = [first, torch.float32, torch.float64, torch.float32]
    rows = [r.to(dtype) for r, dtype in zip(random_rows(4), dtypes, strict=True)]
    mix = random_rows(9)[1].flatten(1)[:, :4]
    repeated = [torch.einsum("ij,j...->i...", mix.to(r), r) for r in rows]
    assert gram(repeated, 9)[1].rank == 4


def test_more_rows_than_parameters():
    values, basis = gram([torch.randn(20, 3, dtype=torch.float64)], 32)
    assert len(values) == 3
    assert identity_error(basis) < ORTHONORMAL[torch.float64]


def test_zero_rows_span_nothing():
    values, basis = gram([torch.zeros(3, *s) for s in SHAPES], 4)
    assert values.shape == (0,)
    assert basis.rank == 0
    params = random_params(dtype=torch.float32)
    before = [p.clone() for p in params]
    coordinates = basis.coordinates(params)
    assert coordinates.shape == (0,)
    basis.expand_into(params, coordinates)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


class Rounded:
    """Gradients of zeros whose Gram matrix is rounding, of the wrong sign."""

    def products(self):
        return -1e-30 * torch.eye(3, dtype=torch.float64)

    def directions(self, mix):
        return DenseBasis([torch.zeros(len(mix), 5)]), torch.arange(len(mix))


def test_rounding_of_zero_rows_spans_nothing():
    values, basis = gram(Rounded(), 2, torch.float32)
    assert (len(values), basis.rank) == (0, 0)


def test_gram_errors():
    with pytest.raises(ValueError, match="rank=0: the safety subspace needs at least one"):
        gram(random_rows(3), 0)
    rows = random_rows(3)
    rows[1][0] = torch.nan
    with pytest.raises(ValueError, match="rows: a safety gradient is not finite"):
        gram(rows, 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 10**6), st.permutations(range(4)))
def test_projection_properties(count, rank, seed, order):
    """P² = P, P leaves Gᵀ's span alone, and the order of the parameters does not matter."""
    rows, vector = random_rows(count, seed), random_params(seed)
    values, basis = gram(rows, rank)
    once = [torch.zeros_like(v) for v in vector]
    basis.expand_into(once, basis.coordinates(vector))
    twice = [torch.zeros_like(v) for v in vector]
    basis.expand_into(twice, basis.coordinates(once))
    assert (flat(twice) - flat(once)).norm() <= 1e-12 * flat(vector).norm()
    if rank >= count:
        residual = dense(rows) - dense(rows) @ projector(basis)
        assert residual.norm() <= 1e-10 * dense(rows).norm()
    shuffled_values, shuffled = gram([rows[i] for i in order], rank)
    assert relative_error(shuffled_values, values) < EIGENVALUE[torch.float64]
    restored = DenseBasis([shuffled.blocks[list(order).index(i)] for i in range(4)])
    assert (projector(restored) - projector(basis)).abs().max() < 1e-8


def test_coordinates_of_missing_tensors_are_zero():
    _, basis = gram(random_rows(5), 3)
    vector = random_params()
    with_zero = [vector[0], torch.zeros_like(vector[1]), *vector[2:]]
    actual = basis.coordinates([vector[0], None, *vector[2:]])
    assert torch.equal(actual, basis.coordinates(with_zero))


def test_inner_and_rows():
    _, basis = gram(random_rows(5), 3)
    _, other = gram(random_rows(5, seed=1), 2)
    expected = dense(basis.blocks) @ dense(other.blocks).T
    assert (basis.inner(other) - expected).abs().max() < 1e-14
    scaled = dense(basis.rows(torch.tensor([3.0, 2.0, 1.0])))
    products = torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64).diag()
    assert (scaled @ scaled.T - products).abs().max() < 1e-12


def test_float32_products_of_long_rows_stay_accurate():
    """Millions of columns: a plain float32 product loses two more digits here."""
    rows = torch.randn(3, 2**21 + 5, generator=torch.Generator().manual_seed(0))
    expected = rows.double() @ rows.double().T
    error = (inner_products([rows], [rows]) - expected).abs().max() / expected.max()
    assert error < 1e-6


def update(previous, params, seed, count=3, held=0, rank=32, window=32):
    rows = random_rows(count, seed)
    losses = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    targets = losses.clone()
    targets[: count - held] = torch.nan
    tokens = torch.zeros(count)  # losses are taken as they are
    subspace = updated_subspace(
        previous, params, rows, losses, tokens, targets, rank=rank, window=window
    )
    return subspace, rows, losses


def test_window_update_equals_an_estimate_from_scratch():
    params, subspace, all_rows, all_losses = random_params(), None, [], []
    safety = torch.full((9,), torch.nan)
    for seed in range(5):
        subspace, rows, losses = update(subspace, params, seed, window=9)
        all_rows, all_losses = [*all_rows, rows][-3:], [*all_losses, losses][-3:]
        joined = [torch.cat(parts) for parts in zip(*all_rows, strict=True)]
        together = torch.cat(all_losses)
        scratch = updated_subspace(
            None,
            params,
            joined,
            together,
            torch.zeros(len(together)),
            safety[: len(together)],
            rank=32,
            window=9,
        )
        assert relative_error(subspace.eigenvalues, scratch.eigenvalues) < 1e-8
        assert (projector(subspace.basis) - projector(scratch.basis)).abs().max() < 1e-8
        assert relative_error(subspace.window.losses, scratch.window.losses) < 1e-12
        # Gradients are the same vectors, expressed in either basis.
        for estimate in (subspace, scratch):
            gradients = estimate.window.coefficients @ dense(estimate.basis.blocks)
            assert relative_error(gradients, dense(joined)) < 1e-8
        assert subspace.surrogate.value == pytest.approx(float(losses.mean()))
        mean = dense(joined).mean(0)
        assert relative_error(subspace.surrogate.gradient @ dense(subspace.basis.blocks), mean) < (
            1e-8
        )


def test_old_losses_follow_their_linear_models():
    params = random_params()
    first, rows, losses = update(None, params, 0)
    change = torch.randn(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parts = change.split([p.numel() for p in params])
    moved = [p + c.view(p.shape) for p, c in zip(params, parts, strict=True)]
    second, _, fresh = update(first, moved, 1)
    assert relative_error(second.window.losses[:3], losses + dense(rows) @ change) < 1e-10
    assert torch.equal(second.window.losses[3:], fresh)
    assert second.coordinates(moved).abs().max() < 1e-14


def test_examples_keep_their_tokens_and_targets():
    """Old ones stand before new ones, in all that is known of them."""
    subspace, params, nan = None, random_params(), torch.nan
    for seed, tokens, targets in (
        (0, [2.0, 3.0, 4.0], [nan, 0.5, nan]),
        (1, [5.0, 6.0], [0.7, nan]),
    ):
        rows, losses = random_rows(len(tokens), seed), torch.full((len(tokens),), seed + 0.1)
        subspace = updated_subspace(
            subspace, params, rows, losses, torch.tensor(tokens), torch.tensor(targets),
            rank=9, window=4,
        )  # fmt: skip
    assert subspace.window.tokens.tolist() == [3, 4, 5, 6]
    assert subspace.window.tokens.dtype == subspace.window.targets.dtype == torch.float64
    assert subspace.window.losses.tolist() == pytest.approx([0.1, 0.1, 1.1, 1.1])
    expected = torch.tensor([0.5, nan, 0.7, nan], dtype=torch.float64)
    assert torch.allclose(subspace.window.targets, expected, equal_nan=True)


def test_truncation_keeps_the_largest_directions():
    subspace, _, _ = update(None, random_params(), 0, count=8, rank=3)
    subspace, rows, _ = update(subspace, random_params(), 1, count=2, rank=3, window=10)
    assert subspace.rank == 3
    assert subspace.window.coefficients.shape == (10, 3)
    assert identity_error(subspace.basis) < ORTHONORMAL[torch.float64]
    assert relative_error(
        subspace.window.coefficients[8:], dense(rows) @ dense(subspace.basis.blocks).T
    ) < (1e-10)


def test_held_examples_shape_the_subspace_but_not_the_surrogate():
    subspace, rows, losses = update(None, random_params(), 0, count=5, held=2)
    assert subspace.rank == 5
    assert subspace.window.targets.isnan().tolist() == [True] * 3 + [False] * 2
    assert torch.equal(subspace.window.targets[3:], losses[3:])
    assert subspace.surrogate.value == pytest.approx(float(losses[:3].mean()))
    gradient = subspace.surrogate.gradient @ dense(subspace.basis.blocks)
    assert relative_error(gradient, dense(rows)[:3].mean(0)) < 1e-8


def test_a_window_smaller_than_the_new_examples_keeps_them_all():
    subspace, _, _ = update(None, random_params(), 0, count=4)
    subspace, _, losses = update(subspace, random_params(), 1, count=4, held=1, window=3)
    assert torch.equal(subspace.window.losses, losses)


def test_examples_without_gradient_span_nothing():
    rows = [torch.zeros(3, *s, dtype=torch.float64) for s in SHAPES]
    targets = torch.full((3,), torch.nan)
    empty = updated_subspace(
        None, random_params(), rows, torch.ones(3), torch.ones(3), targets, rank=4, window=9
    )
    assert empty.rank == 0
    assert empty.window.restoring_step(0.1, 0.1).shape == (0,)
    again, _, losses = update(empty, random_params(), 1)
    assert again.rank == 3
    # They are not carried on: they say nothing of any other point.
    assert torch.equal(again.window.losses, losses)
    assert torch.equal(again.eigenvalues, update(None, random_params(), 1)[0].eigenvalues)


def test_rebase_moves_the_anchor_and_the_models():
    params = random_params()
    subspace, _, losses = update(None, params, 0)
    step = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    slope, coefficients = subspace.surrogate.slope(step), subspace.window.coefficients
    subspace.shift(params, step)
    assert relative_error(subspace.coordinates(params), step) < 1e-12
    subspace.rebase(params, step, 0.7)
    assert subspace.coordinates(params).abs().max() < 1e-14
    assert subspace.surrogate.value == 0.7
    assert torch.equal(subspace.surrogate.gradient, slope)
    assert torch.equal(subspace.window.losses, losses + coefficients @ step)


def test_rebase_starts_at_the_parameters_as_they_were_rounded():
    """In bfloat16 they do not come to θ_r + U·step: that is no drift."""
    params = random_params(dtype=torch.bfloat16)
    subspace, _, _ = update(None, params, 0)
    step = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    subspace.shift(params, step)
    assert (subspace.coordinates(params) - step).abs().max() > 1e-4
    subspace.rebase(params, step, 0.7)
    assert torch.equal(subspace.coordinates(params), torch.zeros(3, dtype=torch.float64))
