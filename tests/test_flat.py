"""Directions in few matrices equal the same directions in one tensor for each parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt import rows
from safeopt.curvature import flat
from safeopt.curvature.flat import FlatBlocks

DTYPES = [torch.float32, torch.float64]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 3),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_any_layout_equals_one_product_for_each_parameter(layout, rank, width, columns):
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(rank, *s, generator=generator, dtype=d) for s, d, _ in layout]
    vectors = [
        [torch.randn(s, generator=generator) if given or other else None for s, _, given in layout]
        for other in (False, True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "_WIDTH", width)
        patch.setattr(rows, "COLUMNS", columns)
        together = FlatBlocks(blocks)
        products = together.products(vectors)
    assert products.dtype == torch.float64
    for mine, block in zip(together.blocks, blocks, strict=True):
        assert torch.equal(mine, block)
        assert mine.dtype == block.dtype
    for row, vector in zip(products, vectors, strict=True):
        expected = torch.zeros(rank, dtype=torch.float64)
        for block, tensor in zip(blocks, vector, strict=True):
            if tensor is not None:
                n = tensor.numel()
                expected += block.double().reshape(rank, n) @ tensor.double().reshape(n)
        assert torch.allclose(row, expected, rtol=1e-5, atol=1e-5)
    moved = [
        torch.zeros(s, dtype=torch.bfloat16 if d == torch.float32 else d) for s, d, _ in layout
    ]
    coefficients = torch.arange(1.0, rank + 1, dtype=torch.float64)
    together.add_into(moved, coefficients)
    for tensor, block in zip(moved, blocks, strict=True):
        whole = torch.tensordot(coefficients.to(block), block, 1)
        assert torch.allclose(tensor.to(block), whole, rtol=1e-2, atol=1e-2)


def test_blocks_are_views_of_few_matrices(monkeypatch):
    blocks = [torch.ones(2, 3, 4), torch.ones(2), torch.ones(2, 5)]
    together = FlatBlocks(blocks)
    assert [segment.matrix.shape for segment in together.segments] == [(2, 18)]
    together.segments[0].matrix.zero_()
    assert not any(block.any() for block in together.blocks)
    assert all(block.all() for block in blocks)
    monkeypatch.setattr(flat, "_WIDTH", 10)
    assert [segment.matrix.shape for segment in FlatBlocks(blocks).segments] == [(2, 12), (2, 6)]


def test_sums_over_many_columns_are_as_precise_as_in_float64():
    """A product of unit vectors over a million columns: float32 alone loses three digits."""
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(1, 1 << 20, generator=generator)
    vector = torch.rand(1 << 20, generator=generator) + 1
    exact = float(block.double() @ vector.double())
    assert float(FlatBlocks([block]).products([[vector]])) == pytest.approx(exact, rel=2e-7)


def test_the_coarsest_dtype_has_the_largest_rounding_unit():
    mixed = [torch.float64, torch.bfloat16, torch.float16, torch.float32]
    assert rows.coarsest(mixed) == torch.bfloat16


def test_tiles_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(rows, "COLUMNS", 1)
    row = torch.ones(1, 100)
    row[0, 0], row[0, 50] = 2.0**40, -(2.0**40)
    assert float(rows.flat_products(row, torch.ones(1, 100))) == 98


def test_rows_may_be_none_and_of_another_dtype():
    none, two = torch.zeros(0, 3, dtype=torch.float64), torch.ones(2, 3)
    assert rows.inner_products([none], [two]).shape == (0, 2)
    assert rows.inner_products([two], [none]).shape == (2, 0)


def test_a_direction_may_be_of_another_dtype():
    block, direction = torch.rand(3, 4), torch.rand(4, dtype=torch.bfloat16)
    expected = block.double() @ direction.double()
    assert torch.allclose(rows.DenseRows([block]).along(0, direction), expected, rtol=1e-6)


def test_products_do_without_autocast_unless_that_is_asked_for():
    block = torch.rand(3, 100)
    with torch.autocast("cpu", torch.bfloat16):
        found = rows.flat_products(block, block)
        with rows.exact_products(block.device, autocast=True):
            assert (block @ block.T).dtype == torch.bfloat16
    assert torch.allclose(found, block.double() @ block.double().T, rtol=1e-6)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_products_do_without_tf32_whatever_training_uses(device):
    matmul = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert rows.rounds_products(torch.device(device))
        with rows.exact_products(torch.device(device)):
            assert matmul.fp32_precision == "ieee"
            assert not rows.rounds_products(torch.device(device))
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), rows.exact_products(torch.device(device)):
            raise ZeroDivisionError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_setting_that_follows_the_general_one_still_does_afterwards(device):
    """transformers' TrainingArguments(tf32=True) sets the general one."""
    for general in ("tf32", "ieee", "tf32"):
        with torch.backends.flags(fp32_precision=general):
            assert rows.rounds_products(torch.device(device)) == (general == "tf32")
            with rows.exact_products(torch.device(device)):
                assert not rows.rounds_products(torch.device(device))


def test_before_torch_2_9_there_is_one_setting(monkeypatch):
    monkeypatch.setattr(rows, "_own_setting", lambda device: None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with rows.exact_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            backend.matmul.fp32_precision = "none"  # that has set it; it followed the general one
