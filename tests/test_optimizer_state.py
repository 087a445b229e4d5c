"""Checkpoints of protected optimizers: they resume bit for bit, and bad ones are refused."""

import copy
import io
from dataclasses import asdict
from functools import partial

import pytest
import torch
from optimizer_table import NEVER, OPTIMIZERS, build, copies, equal, probe_of, run
from tiny_models import safety_batch, tiny_llama, trainable, with_lora
from torch.utils._pytree import tree_leaves

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM
from safeopt.curvature.bases import BASES

names = pytest.mark.parametrize("name", OPTIMIZERS)
OPTIONS = {"refresh": RefreshPolicy.fixed(4), "held": True, "budget": 0.0}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_run(left, right):
    """Same history, counters and subspace; only the clock may differ."""
    assert [asdict(e) for e in left.history] == [asdict(e) for e in right.history]
    passes = [{**s.passes.as_dict(), "seconds": 0} for s in (left, right)]
    assert passes[0] == passes[1]
    assert left.counters() == right.counters()
    assert left.predicted == right.predicted
    for mine, other in zip(left.vectors().values(), right.vectors().values(), strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine.nan_to_num(), other.nan_to_num())


def resumed(model, optimizer, build_again):
    """The run in a new model and optimizer, by way of files."""
    again, fresh = build_again()
    again.load_state_dict(through_a_file(model.state_dict()))
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return again, fresh


@pytest.mark.parametrize(
    ("name", "mode", "saved_at"),
    [
        *((name, "project", 6) for name in OPTIMIZERS),
        *(("ProjectedAdamW", "project", saved_at) for saved_at in (0, 1, 4)),
        *(("safeguard(SGD)", mode, 6) for mode in ("damp", "acceleration", "budget")),
    ],
)
def test_resumes_bit_for_bit(name, mode, saved_at):
    def start():
        return build(name, mode=mode, **OPTIONS)

    model, optimizer = start()
    run(model, optimizer, saved_at)
    again, fresh = resumed(model, optimizer, start)
    expected = run(model, optimizer, 10 - saved_at, start=saved_at)
    assert run(again, fresh, 10 - saved_at, start=saved_at) == expected
    assert equal(again.parameters(), model.parameters())
    assert len(optimizer.safety.history) == 3
    assert optimizer.restore() == fresh.restore()
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["fisher", "random"])
def test_lora_resumes_bit_for_bit(curvature, dtype):
    def start():
        model = with_lora(tiny_llama(layers=1, dtype=dtype), random_b=False)
        return build("ProjectedAdamW", model=model, curvature=curvature, **OPTIONS)

    model, optimizer = start()
    run(model, optimizer, 5)
    again, fresh = resumed(model, optimizer, start)
    run(model, optimizer, 5, start=5)
    run(again, fresh, 5, start=5)
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)


@pytest.mark.parametrize("basis", ["dense", "int8", "factored", "compressed"])
def test_every_kind_of_basis_resumes_bit_for_bit(basis):
    elastic = float(basis in ("dense", "int8"))  # the others pull nothing

    def start(kind=basis):
        model = tiny_llama(hidden=48, layers=1, tied=True)
        return build("safeguard(AdamW)", model=model, basis=kind, elastic=elastic, **OPTIONS)

    model, optimizer = start()
    run(model, optimizer, 6)
    assert optimizer.safety.subspace.basis.kind == basis
    again, fresh = resumed(model, optimizer, start)
    run(model, optimizer, 4, start=6)
    run(again, fresh, 4, start=6)
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)
    plain, dense = start("dense")
    run(plain, dense, 10)
    ends = [o.safety.history[-1].alignment_loss for o in (optimizer, dense)]
    assert ends[0] == pytest.approx(ends[1], rel=0.03 if basis == "compressed" else 1e-3)


@names
def test_the_state_is_a_copy(name):
    """Neither later steps nor the optimizer that loads it change a saved state."""
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 2)
    saved = optimizer.state_dict()["safety"]
    kept = copy.deepcopy(saved)
    _, other = build(name, **OPTIONS)
    other.load_state_dict(optimizer.state_dict() | {"safety": saved})
    run(other.safety.probe.model, other, 6)
    run(model, optimizer, 6, start=2)
    assert saved.keys() == kept.keys()
    for key, value in kept["subspace"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(saved["subspace"][key].nan_to_num(), value.nan_to_num())
    assert equal(saved["subspace"]["basis"]["blocks"], kept["subspace"]["basis"]["blocks"])
    assert saved["history"] == kept["history"]


def frozen(model, share=1.0):
    """The model with that share of its trained parameters frozen."""
    params = trainable(model)
    for p in params[: int(share * len(params))]:
        p.requires_grad_(False)


def same_state(left, right):
    leaves, others = tree_leaves(left), tree_leaves(right)
    return len(leaves) == len(others) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


@names
def test_a_model_may_be_frozen_before_its_optimizer_is_saved(name):
    """The state is the same, for a run that goes on elsewhere or here."""
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 6)
    params, plain = trainable(model), through_a_file(optimizer.state_dict())
    again, fresh = build(name, **OPTIONS)
    again.load_state_dict(model.state_dict())
    for share in (0.5, 1.0):
        frozen(model, share)
        state = through_a_file(optimizer.state_dict())
        assert same_state(state, plain)
        optimizer.load_state_dict(copy.deepcopy(state))
    fresh.load_state_dict(copy.deepcopy(state))
    optimizer.load_state_dict(state)
    for p in params:
        p.requires_grad_(True)
    assert run(model, optimizer, 4, start=6) == run(again, fresh, 4, start=6)
    assert equal(again.parameters(), model.parameters())
    assert_same_run(optimizer.safety, fresh.safety)


@names
@pytest.mark.parametrize("steps", [0, 6])
def test_so_may_a_model_of_a_process_group(name, steps, monkeypatch):
    """Where the basis travels among the parameters' own entries."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: True)
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, steps)
    again, fresh = build(name, **OPTIONS)
    again.load_state_dict(model.state_dict())
    for share in (0.5, 1.0):
        frozen(model, share)
        state = through_a_file(optimizer.state_dict())
        if steps:
            optimizer.load_state_dict(copy.deepcopy(state))
    fresh.load_state_dict(state)
    assert_same_run(optimizer.safety, fresh.safety)
    frozen(again)
    _, other = build(name, model=again, params=list(again.parameters()), **OPTIONS)
    with pytest.raises(ValueError, match="no parameter is left to protect"):
        other.load_state_dict(state)


@names
def test_a_model_may_be_frozen_right_after_its_first_look(name, monkeypatch):
    """Which `restore` has taken, before any step."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: True)
    model, optimizer = build(name, **OPTIONS)
    optimizer.restore()
    frozen(model)
    _, fresh = build(name, **OPTIONS)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_run(optimizer.safety, fresh.safety)


def test_a_larger_basis_of_a_process_group_is_saved_until_the_next_refresh(monkeypatch):
    """Where a run goes on with a smaller ``rank``."""
    monkeypatch.setattr("safeopt.optim.protection.in_process_group", lambda: True)
    model, optimizer = build("ProjectedAdamW", **OPTIONS)
    run(model, optimizer, 6)
    again, fresh = build("ProjectedAdamW", **OPTIONS, rank=3)
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.safety.subspace.rank > 3
    _, other = build("ProjectedAdamW", **OPTIONS, rank=3)
    other.load_state_dict(through_a_file(fresh.state_dict()))
    assert_same_run(other.safety, optimizer.safety)


def without(*path):
    def change(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        del state[last]

    return change


def replaced(value, *path):
    def change(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def not_finite(tensor):
    return torch.full_like(tensor, torch.nan)


SUBSPACE = ("safety", "subspace")
BAD_STATES = {
    "no safety": without("safety"),
    "not a dict": replaced([1], "safety"),
    "version": replaced(99, "safety", "version"),
    "no history": without("safety", "history"),
    "no reference": without("safety", "reference"),
    "reference": replaced("low", "safety", "reference"),
    "step_count": replaced(-1, "safety", "step_count"),
    "drawn": replaced(1.5, "safety", "drawn"),
    "drawn beyond a float": replaced(10**400, "safety", "drawn"),
    "travelled": replaced(None, "safety", "travelled"),
    "travelled backwards": replaced(-1.0, "safety", "travelled"),
    "travelled beyond a float": replaced(10**400, "safety", "travelled"),
    "no reference measured": replaced(None, "safety", "reference"),
    "no odds measured": replaced(None, "safety", "reference_odds"),
    "no trial measured": replaced(None, "safety", "trial_reference"),
    "refreshed in the future": replaced(10**6, "safety", "last_refresh"),
    "checked in the future": replaced(10**6, "safety", "checked"),
    "no first look": replaced([], "safety", "history"),
    "history entry": replaced([[0, 1.0]], "safety", "history"),
    "history value": replaced([[0, torch.nan, None, None, 1]], "safety", "history"),
    "passes": replaced({"forward": 1, "evil": 2}, "safety", "passes"),
    "no basis": without(*SUBSPACE, "basis"),
    "no last_gradient": without(*SUBSPACE, "last_gradient"),
    "a block short": replaced(lambda b: b[1:], *SUBSPACE, "basis", "blocks"),
    "rank": replaced(lambda b: [x[1:] for x in b], *SUBSPACE, "basis", "blocks"),
    "basis nan": replaced(lambda b: [not_finite(x) for x in b], *SUBSPACE, "basis", "blocks"),
    "basis kind": replaced("sparse", *SUBSPACE, "basis", "kind"),
    "basis of another kind": replaced("compressed", *SUBSPACE, "basis", "kind"),
    "basis no dict": replaced([1], *SUBSPACE, "basis"),
    "anchor": replaced(lambda x: x[1:], *SUBSPACE, "anchor"),
    "anchor nan": replaced(not_finite, *SUBSPACE, "anchor"),
    "position": replaced(lambda x: x[1:], *SUBSPACE, "position"),
    "coarse position": replaced(lambda x: x.float(), *SUBSPACE, "position"),
    "coarse gradient": replaced(lambda x: x.half(), *SUBSPACE, "gradient"),
    "sparse anchor": replaced(lambda x: x.to_sparse(), *SUBSPACE, "anchor"),
    "sparse targets": replaced(lambda x: x.to_sparse(), *SUBSPACE, "targets"),
    "sparse basis": replaced(lambda b: [x.to_sparse() for x in b], *SUBSPACE, "basis", "blocks"),
    "anchor without numbers": replaced(lambda x: x.to("meta"), *SUBSPACE, "anchor"),
    "negative eigenvalues": replaced(lambda x: -x, *SUBSPACE, "eigenvalues"),
    "negative tokens": replaced(lambda x: -x, *SUBSPACE, "tokens"),
    "coefficients": replaced(lambda x: x.T[:, :2], *SUBSPACE, "coefficients"),
    "losses": replaced(lambda x: x[1:], *SUBSPACE, "losses"),
    "targets": replaced(lambda x: x[1:], *SUBSPACE, "targets"),
    "last_gradient": replaced(not_finite, *SUBSPACE, "last_gradient"),
    "first_drift": replaced(torch.zeros(1), *SUBSPACE, "first_drift"),
    "value": replaced(float("nan"), *SUBSPACE, "value"),
    "value type": replaced("x", *SUBSPACE, "value"),
}


@pytest.mark.parametrize("name", ["ProjectedAdamW", "safeguard(SGD)"])
def test_bad_states_are_refused_and_change_nothing(name):
    model, optimizer = build(name, **OPTIONS)
    run(model, optimizer, 6)
    good = through_a_file(optimizer.state_dict())
    _, other = build(name, **OPTIONS, lr=3e-3)
    run(other.safety.probe.model, other, 3)
    for reason, change in BAD_STATES.items():
        bad = copy.deepcopy(good)
        change(bad)
        before, subspace = copy.deepcopy(other.state_dict()), other.safety.subspace
        error = None
        try:
            other.load_state_dict(bad)
        except ValueError as refused:
            error = refused
        assert "state_dict" in str(error), reason
        after = other.state_dict()
        assert other.safety.subspace is subspace, reason
        assert after["param_groups"] == before["param_groups"], reason
        for mine, kept in zip(after["state"].values(), before["state"].values(), strict=True):
            assert all(torch.equal(mine[k], kept[k]) for k in mine), reason
        assert after["safety"]["history"] == before["safety"]["history"], reason
    other.load_state_dict(good)
    assert_same_run(other.safety, optimizer.safety)


def spoiled(tree, path=()):
    """Something of another kind in every place of nested dicts and lists, one after the other."""
    places = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(places):
        for wrong in ([1], {}, "x", None, 3, torch.ones(2, 3)):
            if type(wrong) is not type(value):
                tree[key] = wrong
                yield (*path, key), value, wrong
        tree[key] = value
        if isinstance(value, (dict, list)):
            yield from spoiled(value, (*path, key))


def protected(kind):
    """An optimizer of a matrix and a vector, whose state is of this kind."""
    model = tiny_llama(hidden=36, layers=1)
    layer = model.model.layers[0]
    params = [layer.self_attn.q_proj.weight, layer.input_layernorm.weight]
    held = kind != "kl"
    probe = probe_of(model, held=held, loss="nll" if held else "kl")
    if kind == "SafetySAM":
        return model, SafetySAM(params, probe=probe, rank=8)
    basis = kind if kind in BASES else "dense"
    return build("ProjectedAdamW", model=model, params=params, probe=probe, basis=basis)


@pytest.mark.parametrize("kind", [*BASES, "kl", "SafetySAM"])
def test_what_is_of_another_kind_is_refused_by_its_name(kind):
    """Never by an error of Python's or torch's own, and nothing else is taken for a tensor."""
    model, optimizer = protected(kind)
    run(model, optimizer, 2)
    state = optimizer.state_dict()
    own = {key: state[key] for key in ("safety", "sam") if key in state}
    accepted = 0
    for place, kept, wrong in spoiled(own):
        error = None
        try:
            optimizer.load_state_dict({**state, **own})
        except ValueError as refused:
            error = str(refused)
        if error is None:
            accepted += 1
            optional = wrong is None and place[-1] in ("first_drift", "last_gradient", "momentum")
            assert optional or not isinstance(kept, torch.Tensor), place
        else:
            depth = 3 if place[:2] == ("safety", "subspace") else 2
            assert error.startswith("state_dict"), (place, wrong, error)
            assert place[:depth][-1] in error, (place, wrong, error)
    assert accepted > 0  # None, where a figure need not be known yet
    optimizer.load_state_dict(state)


def test_errors_say_which_entry_does_not_fit():
    model, optimizer = build("ProjectedAdamW", **OPTIONS)
    run(model, optimizer, 1)
    for change, message in (
        ("no safety", 'no "safety" entry; it was saved by an unprotected optimizer'),
        ("version", "version 99"),
        ("no reference", "reference is missing"),
        ("travelled", "travelled=None; expected a number of at least 0"),
        ("no trial measured", "trial_reference=None beside a subspace"),
        ("refreshed in the future", "last_refresh=1000000; expected at most step_count=1"),
        ("coarse position", r'\["position"\]: torch.float32, .*expected a dense float64 tensor'),
        ("anchor", r'\["anchor"\]: shape \(\d+,\), expected \(\d+,\)'),
        ("a block short", "do not fit the parameters"),
    ):
        bad = copy.deepcopy(optimizer.state_dict())
        BAD_STATES[change](bad)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)


def test_state_of_another_model_is_refused():
    model, optimizer = build("ProjectedAdamW", **OPTIONS)
    run(model, optimizer, 1)
    _, wider = build("ProjectedAdamW", model=tiny_llama(layers=1, hidden=32), **OPTIONS)
    with pytest.raises(ValueError, match="do not fit the parameters"):
        wider.load_state_dict(optimizer.state_dict())
    _, longer = build("ProjectedAdamW", model=tiny_llama(layers=2), **OPTIONS)
    with pytest.raises(ValueError, match="do not fit the parameters"):
        longer.load_state_dict(optimizer.state_dict())


def test_state_of_a_probe_with_other_held_examples_is_refused():
    for saved, given in ((True, False), (False, True)):
        model, optimizer = build("ProjectedAdamW", held=saved)
        run(model, optimizer, 1)
        _, other = build("ProjectedAdamW", held=given)
        with pytest.raises(ValueError, match="held examples, the probe now has"):
            other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("other", [{"trial_examples": 5}, {"seed": 1}, "probe"])
def test_state_of_other_trial_examples_is_refused(other):
    """What they have lost is told from a loss that was measured on the same ones."""
    model, optimizer = build("ProjectedAdamW")
    run(model, optimizer, 1)
    model = tiny_llama(layers=1)
    if other == "probe":
        other = {"probe": SafetyProbe(model, [safety_batch(seed=seed) for seed in range(3)])}
    _, different = build("ProjectedAdamW", model=model, **other)
    with pytest.raises(ValueError, match="saved with the trial examples"):
        different.load_state_dict(optimizer.state_dict())
    assert different.safety.subspace is None


def test_state_of_another_selection_of_held_examples_is_refused(monkeypatch):
    """Also where as many of them take turns."""
    monkeypatch.setattr("safeopt.optim.geometry._MOST_HELD", 3)

    def start(held):
        model = tiny_llama()
        batches = [safety_batch(seed=seed) for seed in range(held)]
        probe = SafetyProbe(model, [safety_batch(seed=9)], held=batches)
        return model, ProjectedAdamW(model.parameters(), probe=probe)

    model, optimizer = start(1)
    run(model, optimizer, 1)
    start(1)[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="saved with 5 held examples, the probe now has 10"):
        start(2)[1].load_state_dict(optimizer.state_dict())


def test_state_of_other_openings_is_refused():
    def start(opening):
        model = tiny_llama()
        return model, ProjectedAdamW(model.parameters(), probe=probe_of(model, opening=opening))

    model, optimizer = start(2)
    run(model, optimizer, 1)
    start(2)[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="saved with opening=2, the probe now has opening=None"):
        start(None)[1].load_state_dict(optimizer.state_dict())


def test_the_reference_of_a_kl_probe_travels_with_the_state():
    """A resumed run measures against the aligned model, not against the one it resumes from."""

    def start(seed=0):
        model = tiny_llama(layers=1)
        probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=seed)], "kl")
        return build("ProjectedAdamW", model=model, probe=probe, refresh=RefreshPolicy.fixed(4))

    model, optimizer = start(1)
    run(model, optimizer, 6)
    again, fresh = resumed(model, optimizer, partial(start, 1))
    run(model, optimizer, 4, start=6)
    run(again, fresh, 4, start=6)
    assert fresh.safety.measured > 1e-4
    assert_same_run(optimizer.safety, fresh.safety)
    _, other = start(2)
    with pytest.raises(ValueError, match=r"kl_reference.*lacks 5 of the probe's 10 examples"):
        other.load_state_dict(optimizer.state_dict())
    assert other.safety.probe.reference() is None


def test_protection_can_be_switched_off_when_resuming():
    model, optimizer = build("ProjectedAdamW", refresh=NEVER)
    run(model, optimizer, 2)
    again, plain = build("ProjectedAdamW", damping=0)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    before = copies(trainable(again))
    run(again, plain, 1)
    assert not equal(trainable(again), before)
    assert plain.safety.passes.forward == 0
