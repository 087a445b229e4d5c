"""The line search leaves the parameters where it says."""

import pytest
import torch
from optimizer_table import NEVER, build, copies, equal, run
from tiny_models import tiny_llama

from safeopt.optim.line_search import backtrack

LENGTHS = (1.0, 0.5, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("good", [0, 1, 2, None])
def test_parameters_are_where_one_step_of_the_length_leads(dtype, good):
    """In bfloat16 too, in which steps forth and back do not cancel."""
    model = tiny_llama(layers=1, dtype=dtype)
    model, optimizer = build("ProjectedAdamW", model=model, refresh=NEVER)
    run(model, optimizer, 1)
    subspace, params = optimizer.safety.subspace, optimizer.safety.spanned
    start, step = copies(params), torch.full((subspace.rank,), 3e-2, dtype=torch.float64)
    if good is not None:
        subspace.shift(params, LENGTHS[good] * step)
    expected = copies(params)
    assert equal(expected, start) == (good is None)
    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    losses = iter([0.0 if i == good else 2.0 for i in range(len(LENGTHS))])
    found = backtrack(subspace, params, step, LENGTHS, lambda: next(losses), 1.0)
    assert found == ((0.0, None) if good is None else (LENGTHS[good], 0.0))
    assert equal(params, expected)
