"""Tracking of an eigenspace on matrices whose drift is known."""

import math

import pytest
import torch
from test_krylov import Dense, as_basis, decaying, flat
from test_krylov import matrix_of as matrix_and_vectors

from safeopt.curvature.krylov import Eigenpairs, lanczos
from safeopt.curvature.tracking import EigenspaceTracker, drift

RANK = 4


def matrix_of(values):
    return matrix_and_vectors(values)[0]


def turned(matrix, angle, seed=3):
    """The matrix in a frame that is turned by about ``angle`` radians in a random plane a row."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
    skew = (noise - noise.T) / (noise - noise.T).norm(dim=1).mean()
    rotation = torch.linalg.matrix_exp(angle * skew)
    return rotation @ matrix @ rotation.T


def exact(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:RANK]
    zeros = torch.zeros(RANK, dtype=torch.float64)
    return Eigenpairs(values[order], as_basis(vectors.T[order]), zeros, 0, True, True)


def relative_residuals(matrix, pairs):
    u = flat(pairs.basis)
    return (u @ matrix - pairs.eigenvalues[:, None] * u).norm(dim=1) / pairs.eigenvalues.abs()


def leaving_and_staying(matrix, pairs):
    u = flat(pairs.basis)
    image = u @ matrix / pairs.eigenvalues[:, None]
    staying = image @ u.T @ u
    return (image - staying).norm(), staying.norm()


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.3, 2.0])
def test_drift_compares_what_leaves_the_space_with_what_stays(angle):
    before = matrix_of(decaying(indefinite=True))
    after = turned(before, angle)
    pairs = exact(before)
    leaving, staying = leaving_and_staying(after, pairs)
    estimate = drift(Dense(after), pairs, products=400)
    assert estimate == pytest.approx(float(leaving / staying), rel=0.1, abs=1e-8)
    if angle <= 0.02:
        residual = relative_residuals(after, pairs).square().mean().sqrt()
        assert estimate == pytest.approx(float(residual), rel=0.2, abs=1e-8)


def test_rotation_inside_of_the_space_is_no_drift():
    matrix = matrix_of(decaying())
    pairs = exact(matrix)
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)).Q
    rows = q @ flat(pairs.basis)
    mixed = Eigenpairs(pairs.eigenvalues, as_basis(rows), pairs.residuals, 0, True, True)
    assert drift(Dense(matrix), mixed) < 1e-8


def test_zero_eigenvalues_are_left_out():
    matrix = matrix_of(torch.cat([torch.tensor([3.0, 2.0]).double(), decaying()[2:] * 0]))
    assert drift(Dense(matrix), exact(matrix)) < 1e-8
    assert drift(Dense(matrix * 0), exact(matrix * 0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_pairs_than_the_matrix_has_are_kept(dtype):
    """Eigenvalues at rounding level, as those of a Fisher matrix of few examples."""
    values = torch.cat([torch.tensor([3.0, 2.0]).double(), decaying()[2:] * 0])
    tracker = EigenspaceTracker(RANK)
    tracker.update(Dense(matrix_of(values), dtype=dtype))
    action, found = tracker.update(Dense(matrix_of(values), dtype=dtype))
    assert (action, tracker.counts.cold) == ("kept", tracker.pairs.products)
    assert found < 1e-4


def test_a_space_of_zero_eigenvalues_does_not_stay():
    """Nothing of the first matrix speaks for it in another one."""
    matrix = matrix_of(decaying())
    tracker = EigenspaceTracker(RANK, tolerance=1e-6)
    tracker.update(Dense(matrix * 0))
    assert tracker.update(Dense(matrix * 0)) == ("kept", 0.0)
    assert tracker.update(Dense(matrix)) == ("cold", math.inf)
    assert relative_residuals(matrix, tracker.pairs).max() < 1e-5


@pytest.mark.parametrize("leaves", [False, True])
def test_zero_eigenvalues_that_are_no_more(leaves):
    """Whether the new curvature lies in the old space or leads out of it, altogether."""
    eye = torch.eye(100, dtype=torch.float64)
    zeros = torch.zeros(RANK, dtype=torch.float64)
    pairs = Eigenpairs(zeros, as_basis(eye[:RANK]), zeros, 0, True, True)
    assert drift(Dense(eye.roll(50, 0) if leaves else eye), pairs) == math.inf


def test_a_curvature_that_is_gone_keeps_no_eigenvalues():
    matrix = matrix_of(decaying())
    tracker = EigenspaceTracker(RANK)
    tracker.update(Dense(matrix))
    assert tracker.update(Dense(matrix * 0)) == ("cold", math.inf)
    assert not tracker.pairs.eigenvalues.any()


def test_what_the_signs_of_one_test_hide_another_test_shows():
    """Two directions that turn to the same one, which their sum or their difference leaves out."""
    matrix = matrix_of(decaying())
    pairs = exact(matrix)
    one, other = (pairs.eigenvalues[:, None] * flat(pairs.basis))[:2]
    outside = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    turn = 0.4 * torch.outer(outside, one - other)
    turned_apart = Dense(matrix + turn + turn.T)
    hidden = [seed for seed in range(20) if drift(turned_apart, pairs, seed=seed) < 1e-8]
    assert hidden
    tracker = EigenspaceTracker(RANK, seed=hidden[0])
    tracker.update(Dense(matrix))
    tracker.pairs = pairs
    actions = [tracker.update(turned_apart)[0] for _ in range(5)]
    assert actions[0] == "kept"
    assert "updated" in actions


def test_keeps_updates_or_starts_anew_by_the_drift():
    matrix = matrix_of(decaying())
    tracker = EigenspaceTracker(RANK, tolerance=1e-6)
    assert tracker.update(Dense(matrix)) == ("cold", None)
    cold = tracker.counts.cold
    first = tracker.pairs
    action, found = tracker.update(Dense(turned(matrix, 1e-3)))
    assert (action, tracker.pairs) == ("kept", first)
    assert found < tracker.keep_below
    assert tracker.counts.as_dict() == {"test": 2, "warm": 0, "cold": cold}

    near = turned(matrix, 0.15)
    action, found = tracker.update(Dense(near))
    assert action == "updated"
    assert tracker.keep_below < found < tracker.cold_above
    assert tracker.counts.warm == tracker.pairs.products
    assert relative_residuals(near, tracker.pairs).max() < 1e-5

    far = turned(matrix, 2.0)
    action, found = tracker.update(Dense(far))
    assert action == "cold"
    assert found > tracker.cold_above
    assert tracker.counts.cold > cold
    assert relative_residuals(far, tracker.pairs).max() < 1e-5


def test_the_bounds_themselves():
    """Up to the one a basis is kept, from the other on it is not worth starting from."""
    matrix = matrix_of(decaying())
    after = turned(matrix, 0.15)
    first = EigenspaceTracker(RANK)
    first.update(Dense(matrix))
    found = drift(Dense(after), first.pairs)
    for options, action in (
        ({"keep_below": found, "cold_above": found}, "kept"),
        ({"keep_below": 0.0, "cold_above": found}, "cold"),
        ({"keep_below": 0.0, "cold_above": found * (1 + 1e-9)}, "updated"),
    ):
        tracker = EigenspaceTracker(RANK, **options)
        tracker.update(Dense(matrix))
        assert tracker.update(Dense(after)) == (action, found)


def test_the_solver_is_given_the_tracker_s_choices():
    matrix = matrix_of(-decaying(indefinite=True))  # the largest magnitude is not the largest
    options = {"which": "largest", "tolerance": 1e-2, "seed": 5}
    tracker = EigenspaceTracker(RANK, **options)
    tracker.update(Dense(matrix))
    expected = lanczos(Dense(matrix), RANK, **options)
    assert torch.equal(tracker.pairs.eigenvalues, expected.eigenvalues)
    assert torch.equal(flat(tracker.pairs.basis), flat(expected.basis))


def test_the_test_uses_fresh_examples_and_the_update_does_not():
    matrix = matrix_of(decaying())
    tracker = EigenspaceTracker(RANK, test_products=3)
    tracker.update(Dense(matrix))
    whole, fresh = Dense(matrix), Dense(turned(matrix, 0.2))
    tracker.update(whole, fresh)
    assert fresh.products == fresh.shared == tracker.counts.test == 3
    assert whole.products == tracker.pairs.products > 0


def test_small_drift_saves_most_of_the_products():
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0, 4.0]).double(), decaying()[4:] / 4])
    matrix = matrix_of(values)
    pairs = lanczos(Dense(matrix), RANK, tolerance=1e-3)
    after = Dense(turned(matrix, 1e-3))
    warm = lanczos(after, RANK, tolerance=1e-3, start=pairs.basis)
    cold = lanczos(after, RANK, tolerance=1e-3)
    assert warm.products >= RANK
    assert warm.products < 0.75 * cold.products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_below": 0.6}, "keep_below=0.6, cold_above=0.5"),
        ({"keep_below": -0.1}, "keep_below=-0.1"),
        ({"test_products": 0}, "test_products=0"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        EigenspaceTracker(RANK, **options)
    matrix = matrix_of(decaying())
    with pytest.raises(ValueError, match="products=0"):
        drift(Dense(matrix), exact(matrix), products=0)
