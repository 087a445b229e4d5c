"""All kinds of basis against the dense one, and what each promises."""

import io
import logging

import pytest
import torch
from test_factored import factored
from test_krylov import rounded_products
from tiny_models import safety_batch, tiny_llama, trainable, with_lora
from tolerances import COORDINATE, GRADIENT, ORTHONORMAL, relative_error
from torch import nn

from safeopt.curvature.bases import (
    BASES,
    basis_from_state,
    choose_basis,
    compressed,
    empty_basis,
    int8,
    tucker,
)
from safeopt.curvature.bases.compressed import CompressedBasis
from safeopt.curvature.bases.factored import FactoredBasis
from safeopt.curvature.bases.int8 import Int8Basis
from safeopt.curvature.bases.tucker import Tucker
from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.solvers import gram
from safeopt.curvature.subspace import updated_subspace
from safeopt.factored import FactoredRows
from safeopt.factors import Factors
from safeopt.rows import DenseRows, mixed

kinds = pytest.mark.parametrize("kind", BASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


PROMISED = (
    (compressed, "ENERGY", compressed.ENERGY),
    (tucker, "_NEGLIGIBLE", tucker._NEGLIGIBLE),
    (tucker, "STORED", tucker.STORED),
)


@pytest.fixture(autouse=True)
def _lossless(monkeypatch):
    """A compressed basis that leaves nothing out, where a test does not ask for `_lossy`."""
    monkeypatch.setattr(compressed, "ENERGY", 1.0)
    monkeypatch.setattr(tucker, "_NEGLIGIBLE", 1e-13)
    monkeypatch.setattr(tucker, "STORED", torch.float32)


@pytest.fixture
def _lossy(_lossless, monkeypatch):
    for holder, name, value in PROMISED:
        monkeypatch.setattr(holder, name, value)


lossy = pytest.mark.usefixtures("_lossy")


def model_of(dtype=torch.float32, **options):
    return tiny_llama(hidden=48, layers=1, tied=True, dtype=dtype, **options)


def rows_of(model, seed=0, prompts=(3, 6, 4, 9, 5), responses=(2, 4, 3, 1, 5)):
    return factored(model, safety_batch(prompts, responses, seed=seed))[1]


def dense_of(rows):
    return [rows.block(i) for i in range(len(rows.shapes))]


def flat(blocks):
    return torch.cat([block.double().flatten(1) for block in blocks], dim=1)


def first(kind, rows, params, rank=32):
    """Eigenvalues and basis of rows alone."""
    empty = empty_basis(kind, params)
    return gram(empty.window(torch.zeros(0, 0).double(), rows), rank, rows.dtypes[0])


def projection(basis, vector):
    out = [torch.zeros_like(v) for v in vector]
    basis.expand_into(out, basis.coordinates(vector))
    return torch.cat([x.double().flatten() for x in out])


def projected_again(basis, once, like):
    """The projection of a projection, which is given flat."""
    parts = once.split([v.numel() for v in like])
    return projection(basis, [x.view_as(v).to(v) for x, v in zip(parts, like, strict=True)])


def noise(params, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in params]


def inside(rows, vector):
    """A vector with a part in the rows' span as long as the rest of it."""
    mean = [row.mean(0) for row in dense_of(rows)]
    lengths = [torch.cat([x.flatten() for x in v]).norm() for v in (vector, mean)]
    return [v + m * (lengths[0] / lengths[1]) for v, m in zip(vector, mean, strict=True)]


@dtypes
@kinds
@pytest.mark.parametrize("make", [model_of, lambda dtype: with_lora(model_of(dtype))])
def test_same_projection_as_dense(kind, dtype, make):
    model = make(dtype)
    params, rows = trainable(model), rows_of(model)
    values, expected = gram(dense_of(rows), 4)
    actual, basis = first(kind, rows, params, 4)
    assert basis.kind == kind
    assert basis.rank == 4
    assert relative_error(actual, values) < GRADIENT[dtype]
    identity = basis.inner(basis) - torch.eye(4, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[dtype]
    vector = inside(rows, noise(params))
    once, dense = projection(basis, vector), projection(expected, vector)
    if kind == "int8":
        assert abs(float(once.norm() / dense.norm()) - 1) < 0.01
        assert relative_error(once, dense) < 0.05
    else:
        # Energies, the squares of lengths, are known to the dtype's rounding.
        rounding = {torch.float32: 1e-3, torch.float64: 1e-6}[dtype]
        assert relative_error(once, dense) < (rounding if kind == "compressed" else 1e-5)
    assert relative_error(projected_again(basis, once, vector), once) < 10 * ORTHONORMAL[dtype]
    in_basis = basis.coordinates_of(rows)
    one_by_one = [basis.coordinates([block[i] for block in dense_of(rows)]) for i in range(5)]
    assert relative_error(in_basis, torch.stack(one_by_one)) < GRADIENT[dtype]


@kinds
def test_missing_tensors_are_zero_and_other_dtypes_are_kept(kind):
    model = model_of()
    params, rows = trainable(model), rows_of(model)
    _, basis = first(kind, rows, params)
    vector = noise(params)
    gone = [None, *vector[1:]]
    zero = [torch.zeros_like(vector[0]), *vector[1:]]
    assert torch.allclose(basis.coordinates(gone), basis.coordinates(zero), atol=1e-6)
    rounded = [v.bfloat16() for v in vector]
    exact = [v.float() for v in rounded]
    assert torch.allclose(basis.coordinates(rounded), basis.coordinates(exact), atol=1e-6)
    half = [torch.zeros_like(v, dtype=torch.bfloat16) for v in vector]
    full = [torch.zeros_like(v) for v in vector]
    c = torch.ones(basis.rank)
    basis.expand_into(half, c)
    basis.expand_into(full, c)
    assert {x.dtype for x in half} == {torch.bfloat16}
    assert all(torch.equal(h, f.bfloat16()) for h, f in zip(half, full, strict=True))


@kinds
def test_rounded_products_of_training_are_not_used(kind):
    """A basis made and read where training's products have eight bits, against one that is not."""
    model = model_of()
    params, rows = trainable(model), rows_of(model)
    vector = inside(rows, noise(params))
    length = torch.cat([v.flatten() for v in vector]).norm()
    vector = [v / length for v in vector]
    expected, exact = first(kind, rows, params, 4)
    with rounded_products():
        values, basis = first(kind, rows, params, 4)
        identity = basis.inner(basis) - torch.eye(4, dtype=torch.float64)
        once, c = projection(basis, vector), exact.coordinates(vector)
    assert relative_error(values, expected) < GRADIENT[torch.float32]
    assert identity.abs().max() < ORTHONORMAL[torch.float32]
    assert (c - exact.coordinates(vector)).abs().max() < COORDINATE[torch.float32]
    assert relative_error(once, projection(exact, vector)) < GRADIENT[torch.float32]


class Gated(nn.Module):
    """A model with a parameter that is one number and one that has none."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.gate = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, **batch):
        output = self.model(**batch)
        output.logits = output.logits * self.gate
        return output


@kinds
def test_parameters_of_one_number_and_of_none(kind):
    model = Gated(model_of())
    params, rows = trainable(model), rows_of(model)
    _, basis = first(kind, rows, params, 4)
    basis = basis.window(basis.coordinates_of(rows), rows).directions(torch.eye(4, 10).double())[0]
    assert basis.rank == 4
    identity = basis.inner(basis) - torch.eye(4, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[torch.float32]
    vector = inside(rows, noise(params))
    once = projection(basis, vector)
    assert relative_error(projected_again(basis, once, vector), once) < GRADIENT[torch.float32]
    one_by_one = [basis.coordinates([block[i] for block in dense_of(rows)]) for i in range(5)]
    in_basis = basis.coordinates_of(rows)
    assert relative_error(in_basis, torch.stack(one_by_one)) < GRADIENT[torch.float32]
    again = basis_from_state(basis.state_dict(), params)
    assert torch.equal(again.coordinates(vector), basis.coordinates(vector))


@kinds
def test_rows_that_are_scaled(kind):
    model = model_of(torch.float64)
    params = trainable(model)
    rows = rows_of(model).scaled(torch.tensor([2.0, 0.5, -1.0, 3.0, 0.1]).double())
    values, expected = gram(dense_of(rows), 4)
    actual, basis = first(kind, rows, params, 4)
    assert relative_error(actual, values) < GRADIENT[torch.float64]
    vector = inside(rows, noise(params))
    once, dense = projection(basis, vector), projection(expected, vector)
    assert relative_error(once, dense) < (0.05 if kind == "int8" else 1e-6)
    dense = expected.coordinates_of(DenseRows(dense_of(rows)))
    lengths = [x.norm(dim=1) for x in (basis.coordinates_of(rows), dense)]
    assert relative_error(*lengths) < (0.05 if kind == "int8" else 1e-6)


@pytest.mark.parametrize("kind", ["factored", "compressed"])
def test_a_matrix_whose_new_gradients_have_no_factors(kind):
    """Its layer has turned out to need a loop over the examples."""
    model = model_of(torch.float64)
    params, old, new = trainable(model), rows_of(model), rows_of(model, seed=1)
    large = [i for i, p in enumerate(params) if min(p.shape) > compressed.SMALL]
    looped = new.with_dense({i: new.block(i) for i in large[1:3]})
    assert looped.is_dense(large[1])
    assert not looped.is_dense(large[0])
    _, before = first(kind, old, params, 4)
    vector, found = noise(params), []
    for rows in (new, looped):
        values, basis = gram(before.window(before.coordinates_of(old), rows), 6, torch.float64)
        inner = before.inner(basis).norm(dim=1)
        found.append((values, inner, before.coordinates_of(rows), projection(basis, vector)))
    for expected, actual in zip(*found, strict=True):
        assert relative_error(actual, expected) < 1e-6


def refreshed(kind, model, times=3, window=10, rank=32):
    """A subspace after several refreshes while the parameters move."""
    params = [p.detach().clone() for p in trainable(model)]
    subspace = None
    for seed in range(times):
        rows = rows_of(model, seed)
        g = torch.Generator().manual_seed(seed)
        losses = torch.rand(len(rows), generator=g).double() + 0.1
        subspace = updated_subspace(
            subspace, params, rows if kind != "dense" else dense_of(rows), losses,
            torch.full((len(rows),), 3.0), torch.full((len(rows),), torch.nan),
            rank=rank, window=window, kind=kind,
        )  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        for p in params:
            p.add_(torch.randn(p.shape, generator=g).to(p), alpha=1e-3)
    return subspace, params


@pytest.mark.parametrize("kind", ["factored", "compressed"])
def test_a_moving_window_equals_dense(kind):
    model = model_of(torch.float64)
    expected, params = refreshed("dense", model)
    actual, _ = refreshed(kind, model)
    assert actual.basis.kind == kind
    assert relative_error(actual.eigenvalues, expected.eigenvalues) < 1e-8
    assert relative_error(actual.window.losses, expected.window.losses) < 1e-8
    vector = noise(params)
    assert relative_error(projection(actual.basis, vector), projection(expected.basis, vector)) < (
        1e-6
    )
    for window in (actual.window, expected.window):
        assert window.coefficients.shape == (10, 10)
    products = [w.coefficients @ w.coefficients.T for w in (actual.window, expected.window)]
    assert relative_error(*products) < 1e-8
    slopes = [s.surrogate.gradient.norm() for s in (actual, expected)]
    assert relative_error(*slopes) < 1e-8


def test_a_moving_window_in_eight_bits():
    model = model_of()
    expected, params = refreshed("dense", model)
    actual, _ = refreshed("int8", model)
    vector = noise(params)
    error = projection(actual.basis, vector).norm() / projection(expected.basis, vector).norm() - 1
    assert abs(float(error)) < 0.05
    assert relative_error(actual.eigenvalues[:4], expected.eigenvalues[:4]) < 0.01


def test_factored_keeps_the_window_s_examples_only():
    subspace, _ = refreshed("factored", model_of(), times=4, window=7, rank=3)
    assert len(subspace.basis.rows) == len(subspace.window) == 7
    assert subspace.rank == 3


@kinds
def test_fewer_directions_than_examples(kind):
    subspace, _ = refreshed(kind, model_of(torch.float64), rank=3)
    assert subspace.rank == 3
    identity = subspace.basis.inner(subspace.basis) - torch.eye(3, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[torch.float64]


@kinds
def test_state_survives_a_file(kind):
    model = model_of()
    params, rows = trainable(model), rows_of(model)
    _, basis = first(kind, rows, params)
    file = io.BytesIO()
    torch.save(basis.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = basis_from_state(state, params)
    vector = noise(params)
    assert again.kind == kind
    assert again.nbytes == basis.nbytes
    assert torch.equal(again.coordinates(vector), basis.coordinates(vector))
    wider = trainable(tiny_llama(hidden=64, layers=1, tied=True))
    for others in (wider, params[:-1]):
        with pytest.raises(ValueError, match="do not fit"):
            basis_from_state(state, others)


def test_states_of_no_kind_are_refused():
    with pytest.raises(ValueError, match="no basis of a known kind"):
        basis_from_state({"kind": "sparse"}, [torch.zeros(2)])
    with pytest.raises(ValueError, match="do not fit the parameters"):
        basis_from_state({"kind": "factored"}, [torch.zeros(2)])
    for blocks in ([3], [torch.zeros(())], 3):  # no tensor, none of its dimensions, no list
        with pytest.raises(ValueError, match="do not fit the parameters"):
            basis_from_state({"kind": "dense", "blocks": blocks}, [torch.zeros(2)])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("int8", "weights"), ("compressed", "weights"), ("factored", "products"), ("factored", "mix")],
)
def test_matrices_of_another_size_are_refused(kind, name):
    model = model_of()
    params = trainable(model)
    state = first(kind, rows_of(model), params, 3)[1].state_dict()
    for other in (state[name][:, :-1], state[name][:-1], state[name][:-1, :-1]):
        if name == "mix" and other.shape == (2, 5):
            continue  # fewer directions of the same examples are a basis
        with pytest.raises(ValueError, match="do not fit"):
            basis_from_state({**state, name: other}, params)


@kinds
def test_examples_without_gradient_span_nothing(kind):
    model = model_of()
    params, rows = trainable(model), rows_of(model)
    values, basis = first(kind, rows.scaled(torch.zeros(5)), params)
    assert values.shape == (0,)
    assert basis.rank == 0
    c = basis.coordinates(params)
    assert c.shape == (0,)
    before = [p.detach().clone() for p in params]
    basis.expand_into([p.detach() for p in params], c)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    carried = basis.window(torch.zeros(0, 0, dtype=torch.float64), rows)
    assert gram(carried, 4, torch.float32)[1].rank == 4


@kinds
def test_autocast_rounds_nothing(kind):
    """A step under autocast works with the 24 bits of float32: the same bits as without."""
    model = model_of()
    params, old, new = trainable(model), rows_of(model), rows_of(model, seed=1)

    def everything():
        _, before = first(kind, old, params, 4)
        carried = before.window(before.coordinates_of(old), new)
        values, basis = gram(carried, 6, torch.float32)
        step = [torch.zeros_like(p) for p in params]
        basis.expand_into(step, basis.coordinates(params))
        return [values, basis.inner(basis), basis.coordinates_of(new), *step], basis.nbytes

    expected, size = everything()
    with torch.autocast("cpu", torch.bfloat16):
        actual, same = everything()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert same == size


def test_int8_takes_a_byte_a_number():
    model = model_of()
    _, basis = first("int8", rows_of(model), trainable(model))
    size = sum(p.numel() for p in trainable(model))
    assert 17 / 16 * basis.rank * size <= basis.nbytes < 1.1 * basis.rank * size


@pytest.mark.parametrize("columns", [1, 64, 150])
def test_numbers_are_rounded_to_the_nearest_code(columns):
    values = noise([torch.zeros(3, columns)])[0]
    values[1] = 0
    stored = int8.quantised(values)
    [(part, restored)] = stored.chunks(torch.float64)
    assert part == slice(0, columns)
    steps = stored.scales.repeat_interleave(64, 1)[:, :columns].double()
    assert ((restored - values).abs() <= 0.5001 * steps).all()
    assert (stored.scales * 127 == values.abs().amax(1, keepdim=True)).all() or columns > 64


def test_int8_is_the_same_in_many_parts(monkeypatch):
    model = model_of()
    params, old, new = trainable(model), rows_of(model), rows_of(model, seed=1)

    def everything():
        _, before = first("int8", old, params, 4)
        values, basis = gram(before.window(before.coordinates_of(old), new), 6, torch.float32)
        step = [torch.zeros_like(p) for p in params]
        basis.expand_into(step, basis.coordinates(params))
        whole = torch.cat([x.flatten() for x in step])
        return values, basis.inner(before), basis.coordinates_of(new), whole

    expected = everything()
    monkeypatch.setattr(int8, "_TEMPORARY", 1)  # a block of 64 columns at a time
    for actual, e in zip(everything(), expected, strict=True):
        assert relative_error(actual, e) < 1e-4


def test_int8_directions_are_those_before_their_weights():
    """An update starts from U = W·D, not from the rounded D."""
    model = model_of()
    params, rows = trainable(model), rows_of(model)
    _, basis = first("int8", rows, params, 4)
    turn = torch.linalg.qr(torch.arange(16.0).view(4, 4).double() + torch.eye(4)).Q
    turned = Int8Basis(basis.blocks, turn @ basis.weights, basis.dtypes)
    again, _ = turned.updated(torch.eye(4).double(), torch.zeros(4, len(rows)).double(), rows)
    assert (again.inner(turned) - torch.eye(4)).abs().max() < 0.01


def test_factored_keeps_a_gradient_that_no_direction_shows():
    shape, one = [torch.Size([3])], torch.ones(2).double()
    old, new = (
        FactoredRows(shape, [torch.float64], [], {0: rows.double()}, one)
        for rows in (torch.eye(2, 3), torch.tensor([[1.0, 2, 3], [3, 2, 1]]))
    )
    basis = FactoredBasis(old, old.products(), torch.eye(1, 2).double())
    carried = basis.window(0.5 * basis.coordinates_of(old), new)
    expected = torch.tensor([[0.5, 0, 0], [0, 1, 0], [1, 2, 3], [3, 2, 1]]).double()
    assert torch.equal(carried.products(), expected @ expected.T)


def test_factored_bytes_do_not_depend_on_the_rank():
    model = model_of()
    rows, params = rows_of(model), trainable(model)
    sizes = [first("factored", rows, params, rank)[1].nbytes for rank in (1, 5)]
    assert sizes[1] - sizes[0] == 4 * 5 * 8  # four more rows of M
    assert sizes[1] < 0.5 * first("dense", rows, params)[1].nbytes


def low_rank_rows(model, count, tokens, seed=0):
    """Examples of long texts whose tokens have little to tell."""
    return rows_of(model, seed, (tokens,) * count, (6,) * count)


def written_out(basis):
    """A compressed basis's own directions as a dense one."""
    return DenseBasis([mixed(basis.weights, compressed._whole(b)) for b in basis.blocks])


@lossy
@dtypes
def test_compression_keeps_the_energy_it_promises(dtype):
    model = model_of(dtype)
    rows, params = low_rank_rows(model, 8, 12), trainable(model)
    values, exact = first("dense", rows, params, 6)
    actual, basis = first("compressed", rows, params, 6)
    assert torch.equal(values, actual)
    assert compressed.ENERGY - 2e-3 <= basis.energy < 0.9999
    identity = basis.inner(basis) - torch.eye(6, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[dtype]
    whole = written_out(basis)
    overlap = exact.inner(whole)
    assert float((overlap * overlap).sum()) / 6 >= basis.energy - 1e-3
    vector = noise(params)
    assert relative_error(basis.coordinates(vector), whole.coordinates(vector)) < GRADIENT[dtype]
    assert relative_error(projection(basis, vector), projection(whole, vector)) < GRADIENT[dtype]
    written = whole.coordinates_of(DenseRows(dense_of(rows)))
    assert relative_error(basis.coordinates_of(rows), written) < GRADIENT[dtype]
    assert basis_from_state(basis.state_dict(), params).energy == basis.energy
    full = CompressedBasis.empty(params)
    compressed.ENERGY, before = 1.0, compressed.ENERGY
    try:
        _, full = first("compressed", rows, params, 6)
    finally:
        compressed.ENERGY = before
    assert basis.nbytes < full.nbytes
    assert basis.work < full.work


@dtypes
def test_what_is_computed_in_float32_is_stored_in_half_of_it(dtype, monkeypatch):
    """The directions move by the rounding alone, and are orthonormal as they are stored."""
    model = model_of(dtype)
    rows, params = rows_of(model), trainable(model)
    _, exact = first("compressed", rows, params)
    monkeypatch.setattr(tucker, "STORED", torch.bfloat16)
    _, basis = first("compressed", rows, params)
    half = dtype == torch.float32
    kept = {t.dtype for b in basis.blocks if isinstance(b, Tucker) for t in vars(b).values()}
    assert kept == {torch.bfloat16 if half else dtype}
    error = basis.inner(exact) - torch.eye(basis.rank, dtype=torch.float64)
    assert error.abs().max() < (2e-3 if half else ORTHONORMAL[dtype])
    identity = basis.inner(basis) - torch.eye(basis.rank, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[dtype]
    vector = inside(rows, noise(params))
    once = projection(basis, vector)
    assert relative_error(projected_again(basis, once, vector), once) < 10 * ORTHONORMAL[dtype]


@lossy
def test_losses_do_not_add_up_over_the_refreshes():
    model = model_of()
    params, subspaces = trainable(model), {}
    for kind in ("dense", "compressed"):
        subspace = None
        for seed in range(6):
            rows, nan = low_rank_rows(model, 2, 12, seed), torch.full((2,), torch.nan)
            subspace = updated_subspace(
                subspace, params, rows, torch.ones(2), torch.zeros(2), nan,
                rank=32, window=8, kind=kind,
            )  # fmt: skip
        subspaces[kind] = subspace
    exact, actual = (subspaces[kind].basis for kind in ("dense", "compressed"))
    whole = written_out(actual)
    overlap = exact.inner(whole)
    assert actual.energy >= compressed.ENERGY - 2e-3
    assert float((overlap * overlap).sum()) / 8 >= compressed.ENERGY - 1e-2


@pytest.mark.parametrize("case", ["outputs", "inputs", "read", "examples"])
def test_tokens_count_by_what_the_directions_hold_of_them(case, monkeypatch):
    """What is left out at once is small as a product of both factors, whatever one of them is."""
    monkeypatch.setattr(tucker, "_NEGLIGIBLE", 1e-3)
    one, other = torch.eye(36, dtype=torch.float64)[:2], torch.eye(40, dtype=torch.float64)[:2]
    # Token 0 is long on the side named, but its gradient is a millionth of that of token 1.
    long, short = torch.tensor([1.0, 1e-3]).double(), torch.tensor([1e-6, 1e3]).double()
    right = one * {"outputs": short, "inputs": long}.get(case, torch.ones(2).double())[:, None]
    left = other * {"outputs": long, "inputs": short}.get(case, torch.ones(2).double())[:, None]
    counts, scale = [2], torch.ones(1).double()
    if case == "read":  # of an embedding: the token is a number
        left, right = torch.tensor([0, 1]), one * short[:, None]
    if case == "examples":  # two of them, the second with short factors and a large scale
        counts, scale = [1, 1], torch.tensor([1e-6, 1.0]).double()
        right = one * torch.tensor([1.0, 1e-4]).double()[:, None]
    site = Factors(right, {0: left}, counts, torch.arange(2))
    rows = FactoredRows([torch.Size((40, 36))], [torch.float64], [site], {}, scale)
    params = [torch.zeros(40, 36, dtype=torch.float64)]
    mix = torch.diag(rows.products().diagonal().rsqrt())
    empty = empty_basis("compressed", params).window(torch.zeros(0, 0).double(), rows)
    basis, kept = empty.directions(mix)
    assert len(kept) == len(counts)
    expected = DenseBasis([mixed(mix, rows.block(0))])
    assert relative_error(written_out(basis).inner(expected), torch.eye(len(mix))) < 1e-3


@lossy
def test_ranks_are_bounded_where_the_energy_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(tucker, "LARGEST_RANK", 5)
    model = model_of()
    rows, params = low_rank_rows(model, 8, 12), trainable(model)
    _, basis = first("compressed", rows, params, 6)
    sides = [b.cores.shape[1:] for b in basis.blocks if isinstance(b, Tucker)]
    assert len(sides) == 5 + 1  # q, o, gate, up, down and the embedding; k and v are small
    assert max(max(side) for side in sides) == 5
    assert basis.energy < compressed.ENERGY
    identity = basis.inner(basis) - torch.eye(basis.rank, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[torch.float32]


def test_columns_are_made_orthonormal_around_the_same_directions():
    left, cores, right = noise([torch.zeros(9, 4), torch.zeros(2, 4, 3), torch.zeros(7, 3)])
    block = Tucker(left.double(), cores.double(), right.double())
    restored = block.restored()
    assert relative_error(compressed._whole(restored), compressed._whole(block)) < 1e-14
    for q in (restored.left, restored.right):
        assert (q.T @ q - torch.eye(q.shape[1])).abs().max() < ORTHONORMAL[torch.float64]


def test_directions_that_compression_loses_leave_with_their_eigenvalues(monkeypatch):
    monkeypatch.setattr(compressed, "ENERGY", 0.5)
    monkeypatch.setattr(compressed, "_LOST", 0.6)
    model = model_of(torch.float64)
    rows, params = low_rank_rows(model, 8, 12), trainable(model)
    values, exact = first("dense", rows, params, 8)
    kept, basis = first("compressed", rows, params, 8)
    assert 0 < basis.rank < 8
    assert len(kept) == basis.rank
    places = [int((values - value).abs().argmin()) for value in kept]
    assert relative_error(values[places], kept) < 1e-10
    overlap = exact.inner(written_out(basis)).abs()
    assert overlap.argmax(0).tolist() == places
    identity = basis.inner(basis) - torch.eye(basis.rank, dtype=torch.float64)
    assert identity.abs().max() < ORTHONORMAL[torch.float64]


def test_directions_that_compression_loses_are_left_out():
    products = torch.eye(4, dtype=torch.float64)
    products[1, 1] = 0.01
    products[2, 3] = products[3, 2] = 0.999
    assert compressed._independent(products).tolist() in ([0, 2], [0, 3])
    assert compressed._independent(torch.zeros(0, 0)).tolist() == []


def test_the_columns_with_least_energy_for_their_bytes_go_first():
    columns = [
        (0, torch.tensor([4.0, 1.0, 0.3]), 10),
        (0, torch.tensor([5.0, 0.3]), 100),
        (3, torch.tensor([0.2, 0.1]), 1),
        (3, torch.tensor([0.2, 0.1]), 1),
    ]
    assert compressed._ranks(columns, 0.65) == {0: (2, 1), 3: (2, 2)}
    assert compressed._ranks(columns, -1.0) == {0: (3, 2), 3: (2, 2)}
    assert compressed._ranks([], 1.0) == {}


def test_compressed_needs_factors():
    model = model_of()
    rows, params = rows_of(model), trainable(model)
    with pytest.raises(TypeError, match="DenseRows: a compressed basis is made of factored"):
        first("compressed", DenseRows(dense_of(rows)), params)


def test_auto_picks_by_bytes_and_says_so(caplog, monkeypatch):
    model = tiny_llama()
    params = trainable(model)
    with caplog.at_level(logging.INFO, logger="safeopt"):
        assert choose_basis("auto", params, 32, model) == "dense"
    assert 'basis="auto": dense' in caplog.text
    monkeypatch.setattr("safeopt.curvature.bases._ALWAYS_FITS", 0)
    assert choose_basis("auto", params, 32, model) == "compressed"
    assert choose_basis("auto", params[:1], 1, model) == "dense"
    assert choose_basis("auto", params, 1, model) == "int8"
    half = tiny_llama().bfloat16()  # a direction takes four bytes a number all the same
    assert choose_basis("auto", trainable(half)[:1], 1, half) == "dense"
    size = sum(p.nbytes for p in half.parameters())
    monkeypatch.setattr("safeopt.curvature.bases._SHARE", 3 * params[0].numel() / size)
    assert choose_basis("auto", trainable(half)[:1], 1, half) == "int8"
    assert choose_basis("factored", params, 32, model) == "factored"
    with pytest.raises(ValueError, match='basis="sparse": expected one of "dense"'):
        choose_basis("sparse", params, 32, model)
