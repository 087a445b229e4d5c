"""Protected training with every storage of the basis."""

import copy

import pytest
import torch
from optimizer_table import build, copies, equal, run
from tiny_models import tiny_llama, trainable

from safeopt import RefreshPolicy

KINDS = ["dense", "int8", "factored", "compressed"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_every_storage(kind):
    """The subspace is renewed, the step inside it taken back, and a checkpoint continues it."""
    model, optimizer = build(
        "ProjectedAdamW",
        basis=kind,
        refresh=RefreshPolicy.fixed(3),
        held=True,
        restore_alignment=False,
    )
    run(model, optimizer, 4)
    subspace = optimizer.safety.subspace
    assert subspace.basis.kind == kind
    assert subspace.rank > 0
    before = [torch.zeros_like(p) for p in trainable(model)]
    subspace.shift(before, torch.ones(subspace.rank, dtype=torch.float64))
    length = sum(float((x.double() ** 2).sum()) for x in before) ** 0.5
    # int8 keeps each direction to about one percent.
    assert length == pytest.approx(subspace.rank**0.5, rel=0.03 if kind == "int8" else 1e-3)
    left = subspace.coordinates(trainable(model)).abs().max()
    assert left < (1e-2 if kind == "int8" else 1e-4)

    again = tiny_llama(layers=1)
    again.load_state_dict(model.state_dict())
    _, resumed = build(
        "ProjectedAdamW",
        model=again,
        basis=kind,
        refresh=RefreshPolicy.fixed(3),
        held=True,
        restore_alignment=False,
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, 4, start=4)
    run(again, resumed, 4, start=4)
    assert equal(trainable(model), trainable(again))


def test_dense_and_factored_train_alike():
    ends = []
    for kind in ("dense", "factored"):
        model, optimizer = build(
            "ProjectedAdamW", basis=kind, refresh=RefreshPolicy.fixed(2), elastic=0.0
        )
        run(model, optimizer, 6)
        ends.append(torch.cat([p.flatten() for p in copies(trainable(model))]))
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[0].norm()


def test_auto_is_dense_for_small_models_and_unknown_names_are_refused():
    model, optimizer = build("ProjectedAdamW")
    run(model, optimizer, 1)
    assert optimizer.safety.subspace.basis.kind == "dense"
    with pytest.raises(ValueError, match='basis="sparse": expected one of "dense"'):
        build("ProjectedAdamW", basis="sparse")
