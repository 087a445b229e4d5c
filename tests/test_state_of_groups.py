"""A subspace is loaded for the parameters that it was estimated on, and only where it is used."""

import copy

import pytest
import torch
from optimizer_table import build, copies, equal, names, run
from test_optimizer_state import OPTIONS, assert_same_run, through_a_file
from tiny_models import tiny_llama
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict

from safeopt.optim.state import check_state


def start(name, *, swapped=False, model=None, **options):
    """Two groups of equal shapes."""
    model = tiny_llama(layers=2) if model is None else model
    groups = [{"params": list(layer.parameters())} for layer in model.model.layers]
    groups = groups[::-1] if swapped else groups
    return build(name, model=model, params=groups, **OPTIONS, **options)


def saved(name):
    model, optimizer = start(name)
    run(model, optimizer, 6)
    again = tiny_llama(layers=2)
    again.load_state_dict(model.state_dict())
    return model, optimizer, again


@names
@pytest.mark.parametrize("grouped", [False, True])
def test_groups_may_change_places_between_the_first_step_and_a_checkpoint(
    name, grouped, monkeypatch
):
    """Its other entries are by their places at the checkpoint, and the run goes on bit for bit."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: grouped)
    model, optimizer, again = saved(name)
    optimizer.param_groups.reverse()
    _, fresh = start(name, swapped=True, model=again)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert run(again, fresh, 4, start=6) == run(model, optimizer, 4, start=6)
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)


@names
def test_an_optimizer_built_in_another_order_gets_each_parameter_its_directions(name):
    model, optimizer, again = saved(name)
    _, fresh = start(name, swapped=True, model=again)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = dict(zip(model.parameters(), again.parameters(), strict=True))
    for safety, moved in ((optimizer.safety, params), (fresh.safety, [own[p] for p in params])):
        assert safety.spanned == moved
        safety.subspace.shift(safety.spanned, torch.ones(safety.subspace.rank))
    assert equal(again.parameters(), model.parameters())
    state, other = (o.state_dict()["safety"]["subspace"] for o in (optimizer, fresh))
    assert state["names"] == other["names"]
    assert equal(state["basis"]["blocks"], other["basis"]["blocks"])


@names
@pytest.mark.parametrize("swapped", [False, True])
def test_a_distributed_checkpoint_finds_groups_in_another_order(name, swapped, monkeypatch):
    """torch matches its entries and groups by the parameters' names."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: True)
    model, optimizer, again = saved(name)
    state = through_a_file(get_optimizer_state_dict(model, optimizer))
    _, fresh = start(name, swapped=swapped, model=again)
    set_state_dict(again, fresh, model_state_dict=model.state_dict(), optim_state_dict=state)
    run(model, optimizer, 4, start=6)
    run(again, fresh, 4, start=6)
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)


def test_a_model_with_other_names_is_resumed_in_the_order_given():
    """As a compiled one has them."""
    model, optimizer, again = saved("ProjectedAdamW")
    state = through_a_file(optimizer.state_dict())
    subspace = state["safety"]["subspace"]
    subspace["names"] = [f"_orig_mod.{name}" for name in subspace["names"]]
    _, fresh = start("ProjectedAdamW", model=again)
    fresh.load_state_dict(state)
    run(model, optimizer, 4, start=6)
    run(again, fresh, 4, start=6)
    assert equal(again.parameters(), model.parameters())


def test_an_order_that_cannot_be_followed_is_refused():
    """DeepSpeed's is that of its flat vectors."""
    model, optimizer, _ = saved("ProjectedAdamW")
    state = copy.deepcopy(optimizer.state_dict()["safety"])
    params = optimizer.safety.spanned
    check_state(state, params, optimizer.safety)
    half = len(params) // 2
    with pytest.raises(
        ValueError,
        match=r'\["names"\]: parameter 0 was model\.layers\.0\.self_attn\.q_proj\.weight and is '
        r"now model\.layers\.1\.self_attn\.q_proj\.weight; give the optimizer its parameters",
    ):
        check_state(state, params[half:] + params[:half], optimizer.safety)
    for wrong in (None, ["x"], [1] * len(params)):
        bad = {**state, "subspace": {**state["subspace"], "names": wrong}}
        before = copies(model.parameters())
        with pytest.raises(ValueError, match=r'state_dict.*\["names"\]'):
            optimizer.load_state_dict({**optimizer.state_dict(), "safety": bad})
        assert equal(model.parameters(), before)


@names
def test_without_protection_none_is_kept_or_handed_on(name, monkeypatch):
    """Of a state whose groups and parameters carry it: by the next save it would be out of date."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: True)
    _, optimizer, again = saved(name)
    state = through_a_file(optimizer.state_dict())
    _, off = start(name, model=again, damping=0)
    off.load_state_dict(copy.deepcopy(state))
    assert not any("safe" in key for group in off.param_groups for key in group)
    assert not any("safety_basis" in entry for entry in off.state.values())
    run(again, off, 1, start=6)
    with pytest.raises(ValueError, match="state_dict: it has no"):
        optimizer.load_state_dict(off.state_dict())
    optimizer.load_state_dict(state)
