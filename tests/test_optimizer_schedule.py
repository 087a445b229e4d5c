"""When protected optimizers look at the safety examples, what that costs, and what they refuse."""

import math

import pytest
import torch
from optimizer_table import NEVER, OPTIMIZERS, build, copies, equal, probe_of, run
from tiny_models import safety_batch, task_step, tiny_llama, trainable
from torch import nn

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyConfig, SafetyProbe, safeguard
from safeopt.curvature.window import log_odds

names = pytest.mark.parametrize("name", OPTIMIZERS)


def record_passes(model):
    """The safety passes as the model sees them: tokens and whether gradients are wanted."""
    seen = []

    def record(module, args, kwargs, output):
        if not module.training:
            tokens = int(kwargs["attention_mask"].sum())
            seen.append((tokens, output.logits.requires_grad))

    model.register_forward_hook(record, with_kwargs=True)
    model.train()
    return seen


def assert_counted(passes, seen):
    assert passes.forward == len(seen)
    assert passes.forward_tokens == sum(tokens for tokens, _ in seen)
    assert passes.backward == sum(backward for _, backward in seen)
    assert passes.backward_tokens == sum(tokens for tokens, backward in seen if backward)


@names
def test_refreshes_and_passes_are_exact(name):
    """A refresh is one forward and one backward pass, and happens where the policy says."""
    model, optimizer = build(
        name, refresh=RefreshPolicy.fixed(3), restore_alignment=False, examples=3
    )
    seen = record_passes(model)
    run(model, optimizer, 8)
    safety = optimizer.safety
    assert [entry.step for entry in safety.history] == [0, 3, 6]
    assert [entry.examples for entry in safety.history] == [2, 3, 3]
    # The trial examples before fine-tuning, then three estimates.
    assert [backward for _, backward in seen] == [False] + [True] * 3
    assert_counted(safety.passes, seen)
    assert (safety.step_count, safety.last_refresh) == (8, 6)


@names
def test_refreshes_in_quick_succession_take_fewer_examples(name):
    model, optimizer = build(
        name, refresh=RefreshPolicy.geometric(1, 2), examples=4, restore_alignment=False
    )
    run(model, optimizer, 17)
    assert [entry.step for entry in optimizer.safety.history] == [0, 1, 2, 4, 8, 16]
    assert [entry.examples for entry in optimizer.safety.history] == [2, 2, 2, 2, 4, 4]


@names
def test_held_examples_cost_a_share(name):
    """Three held examples for four safety examples, in the same passes."""
    model, optimizer = build(
        name, held=True, refresh=RefreshPolicy.fixed(4), budget=math.inf, examples=4
    )
    seen = record_passes(model)
    run(model, optimizer, 4)
    assert [backward for _, backward in seen] == [False, True, True]
    assert_counted(optimizer.safety.passes, seen)
    window = optimizer.safety.subspace.window
    assert int(window.safety.sum()) == sum(e.examples for e in optimizer.safety.history) == 2 + 4
    assert len(window) == 2 + 4 + 2 + 3


def test_held_examples_are_held_where_the_aligned_model_had_them():
    """Also those whose turn comes after the model has moved."""
    model = tiny_llama()
    harmless = safety_batch(responses=(1,) * 5, seed=2)
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)], held=[harmless])
    optimizer = ProjectedAdamW(
        model.parameters(), lr=3e-2, probe=probe, refresh=RefreshPolicy.fixed(2), examples=2
    )
    rota = optimizer.safety.rota
    aligned = probe.values(rota.held).double()
    rarely = math.log(100)
    assert aligned.min() < rarely < aligned.max(), "both limits occur"
    run(model, optimizer, 4)
    assert torch.allclose(rota.held_targets, aligned.clamp(max=rarely), rtol=1e-5)
    turns = [position % 5 for position in range(rota.held_drawn)]
    window = optimizer.safety.subspace.window
    assert len(turns) == 6
    assert torch.equal(window.targets[~window.safety].cpu(), rota.held_targets[turns])
    latest = turns[-2:]
    assert not torch.allclose(window.losses[-2:].cpu(), aligned[latest], rtol=0.1), "it has moved"


def test_so_many_held_examples_take_turns(monkeypatch):
    monkeypatch.setattr("safeopt.optim.geometry._MOST_HELD", 3)
    model, optimizer = build("ProjectedAdamW", held=True, refresh=RefreshPolicy.fixed(2))
    seen = record_passes(model)
    run(model, optimizer, 4)
    rota, probe = optimizer.safety.rota, optimizer.safety.probe
    assert len(set(rota.held)) == len(rota.held_targets) == 3
    assert rota.held_drawn == 6  # twice round
    first = [len(probe._examples[index]["input_ids"]) for index in [*rota.trial, *rota.held]]
    assert seen[0] == (sum(first), False), "the others are not even measured"


def recorded_ways(monkeypatch):
    """How far each example is to be brought in all restoring steps, in nats of log-odds."""
    ways = []

    def record(matrix, way):
        ways.append(way.clone())
        return torch.zeros_like(way)

    monkeypatch.setattr("safeopt.curvature.window.nonnegative_minimum", record)
    return ways


@pytest.mark.parametrize("budget", [0.0, 0.05])
def test_a_refresh_aims_beyond_by_what_is_missing_at_most_a_nat(budget, monkeypatch):
    """But not for examples within their budget, and not in `restore`."""
    ways = recorded_ways(monkeypatch)
    model, optimizer = build("ProjectedAdamW", refresh=RefreshPolicy.fixed(2), budget=budget)

    def missing():
        window = optimizer.safety.subspace.window
        reference = torch.full_like(window.losses, optimizer.safety._reference_odds)
        limits = torch.nn.functional.softplus(-reference) / window.tokens + budget
        return -torch.log(torch.expm1(limits * window.tokens)) - window.log_odds

    run(model, optimizer, 2)
    before = missing()
    assert before.max() > 1 > before.min(), "both cases occur"
    assert torch.allclose(ways[0], before + before.clamp(0, 1), atol=1e-9)
    run(model, optimizer, 1, start=2)
    optimizer.restore()
    assert len(ways[1]) > len(ways[0])
    assert torch.allclose(ways[1], missing()[: len(ways[1])], atol=1e-9)


def test_a_kl_probe_aims_at_its_goal(monkeypatch):
    ways = recorded_ways(monkeypatch)
    model = tiny_llama()
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)], "kl")
    optimizer = ProjectedAdamW(
        model.parameters(), probe=probe, refresh=RefreshPolicy.fixed(2), budget=1e-3
    )
    run(model, optimizer, 2)
    window = optimizer.safety.subspace.window
    expected = log_odds(torch.full_like(window.losses, 1e-3), window.tokens) - window.log_odds
    assert torch.allclose(ways[0], expected, atol=1e-3)


def test_a_look_may_be_larger_than_the_window():
    """Held examples come on top of a window that only holds the safety examples."""
    model, optimizer = build(
        "ProjectedAdamW",
        held=True,
        refresh=RefreshPolicy.fixed(8),
        examples=3,
        window=3,
        rank=32,
        budget=math.inf,
    )
    run(model, optimizer, 8)
    assert optimizer.safety.subspace.rank == 3 + 2
    run(model, optimizer, 7, start=8)
    optimizer.restore()
    assert optimizer.safety.subspace.rank == optimizer.safety.config.largest_rank == 6 + 5


@names
def test_restore_looks_at_up_to_twice_as_many_examples(name):
    """As many as steps since the last refresh, at least two."""
    for steps, expected in ((1, 2), (4, 4), (7, 6)):
        model, optimizer = build(name, refresh=NEVER, budget=math.inf, examples=3)
        run(model, optimizer, steps)
        assert optimizer.restore().examples == expected


@names
def test_restore_measures_the_trial_examples(name):
    """Also right after a scheduled refresh; and again only after another step."""
    for refresh, expected in ((NEVER, [False, True]), (RefreshPolicy.fixed(3), [False])):
        model, optimizer = build(name, refresh=refresh, budget=math.inf)
        first = optimizer.restore()
        assert (first.step, optimizer.safety.passes.backward) == (0, 1)
        run(model, optimizer, 3)
        seen = record_passes(model)
        measured = optimizer.restore()
        assert measured.step == 3
        assert measured.restored_to is None
        assert [backward for _, backward in seen] == expected
        assert optimizer.restore() is measured
        assert len(seen) == len(expected)
        assert optimizer.safety.measured == measured.alignment_loss


def lose_everything(optimizer):
    """Make the optimizer believe that the model was perfectly aligned, so that all is lost."""
    optimizer.safety.reference = optimizer.safety._trial_reference = 0.0
    optimizer.safety._reference_odds = 13.0


@names
def test_restore_ends_after_two_rounds(name, caplog):
    model, optimizer = build(name, refresh=NEVER, budget=0.0)
    run(model, optimizer, 1)
    lose_everything(optimizer)
    seen = record_passes(model)
    before = optimizer.safety.probe.passes.forward
    measured = optimizer.restore()
    assert measured.restored_to < optimizer.safety.history[1].alignment_loss
    assert sum(backward for _, backward in seen) == 2
    # The second round is the last chance: it looks at as many examples as it may.
    assert [entry.examples for entry in optimizer.safety.history] == [2, 2, 6]
    assert len(seen) <= 1 + 4 + 1 * (1 + 3)  # each round: one look, up to three lengths
    assert optimizer.safety.passes.forward - before == len(seen)
    assert "restore: the trial examples' alignment loss is" in caplog.text
    assert "% of the rise is left" in caplog.text
    assert optimizer.restore() is measured


@names
def test_line_search_backtracks(name, monkeypatch):
    """Lengths 1, ½, ¼ of one step are tried; without a gain the parameters stay."""
    moves = []
    for values in ([1.0, 0.9], [1.0, 1.1, 0.9], [1.0, 1.1, 1.1, 0.9], [1.0] + [1.1] * 3):
        model, optimizer = build(name, refresh=NEVER, budget=0.0)
        run(model, optimizer, 1)
        lose_everything(optimizer)
        optimizer.safety._trial_reference = 0.95
        accepted = values[-1] < 1
        before, script = copies(trainable(model)), iter(values)
        monkeypatch.setattr(optimizer.safety.probe, "value", lambda *args, s=script: next(s))
        optimizer.safety._refresh(trainable(model), lambda: None, 2, search=True)
        assert next(script, None) is None
        measured = optimizer.safety.history[-1]
        assert measured.restored_to == (values[-1] if accepted else 1.0)
        moves.append(
            torch.cat([(p - q).flatten() for p, q in zip(trainable(model), before, strict=True)])
        )
    for move, length in zip(moves, (1.0, 0.5, 0.25, 0.0), strict=True):
        assert (move - length * moves[0]).norm() < 1e-4 * moves[0].norm()


@names
def test_drift_triggers_a_refresh(name):
    for drift, expected in ((1e-6, True), (None, False), (1e9, False)):
        policy = RefreshPolicy(first=1000, every=1000, drift=drift)
        model, optimizer = build(name, refresh=policy)
        run(model, optimizer, 1)
        assert optimizer.safety.last_refresh == 0 or drift == 1e-6
        subspace = optimizer.safety.subspace
        # The task pushes far up the alignment loss, and the map takes it back.
        subspace.shift(trainable(model), 10 * subspace.surrogate.gradient)
        run(model, optimizer, 1, start=1)
        assert (optimizer.safety.last_refresh > 0) == expected


@names
def test_steps_that_move_nothing_are_inert(name):
    """No gradients, or learning rate 0 as distributed checkpointing uses it: nothing happens."""
    model, optimizer = build(name, refresh=RefreshPolicy.fixed(1))

    def inert_steps():
        optimizer.zero_grad()
        optimizer.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.step(lambda: torch.zeros(()))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    before = copies(model.parameters())
    inert_steps()
    assert equal(model.parameters(), before)
    assert optimizer.safety.passes.forward == optimizer.safety.step_count == 0
    assert optimizer.safety.subspace is None
    run(model, optimizer, 2)
    after, passes = copies(model.parameters()), optimizer.safety.passes.forward
    inert_steps()
    assert equal(model.parameters(), after)
    assert (optimizer.safety.passes.forward, optimizer.safety.step_count) == (passes, 2)


@names
def test_the_rate_of_a_group_without_anything_to_train_does_not_count(name):
    model = tiny_llama(layers=1)
    trained, frozen = list(model.parameters())[1:], list(model.parameters())[:1]
    frozen[0].requires_grad_(False)
    groups = [{"params": trained, "lr": 1e-3}, {"params": frozen, "lr": 0.5}]
    _, optimizer = build(name, model=model, params=groups, refresh=NEVER)
    run(model, optimizer, 1)
    assert optimizer.safety.last_rate == 1e-3
    optimizer.param_groups[0]["lr"] = 0.0
    run(model, optimizer, 1)
    assert optimizer.safety.step_count == 1


@names
def test_closures(name):
    model, optimizer = build(name, refresh=RefreshPolicy.fixed(2))
    plain, reference = build(name, refresh=RefreshPolicy.fixed(2))
    expected = run(plain, reference, 4)
    for step in range(4):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(1)
            assert optimizer.safety.history  # the reference is taken before training
            return task_step(model, step)

        assert float(optimizer.step(closure)) == expected[step]
        assert len(calls) == 1
    assert equal(model.parameters(), plain.parameters())


@names
def test_skipped_steps_of_a_gradient_scaler_do_not_count(name):
    model, optimizer = build(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        scaler.scale(task_step(model, step))
        for p in trainable(model):
            p.grad *= math.inf if step == 1 else 4.0
        before = copies(model.parameters())
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert equal(model.parameters(), before) == (step == 1)
    assert optimizer.safety.step_count == 3


WRONG = [
    ({"rank": 0}, ValueError, "rank=0: the safety subspace needs at least one direction"),
    ({"rank": 2.5}, ValueError, r"rank=2\.5"),
    ({"mode": "hard"}, ValueError, '="hard": expected one of "project"'),
    ({"damping": -1}, ValueError, "damping=-1"),
    ({"damping": math.nan}, ValueError, "damping=nan"),
    ({"damping": math.inf}, ValueError, "damping=inf"),
    ({"budget": -0.1}, ValueError, r"budget=-0\.1"),
    ({"budget": None}, ValueError, "budget=None"),
    ({"refresh": 10}, TypeError, "refresh=10: expected a RefreshPolicy"),
    ({"examples": 0}, ValueError, "examples=0"),
    ({"examples": 9, "window": 8}, ValueError, "window=8"),
    ({"newton_damping": 0.0}, ValueError, r"newton_damping=0\.0"),
    ({"newton_damping": "x"}, ValueError, "newton_damping=x"),
    ({"trial_examples": 0}, ValueError, "trial_examples=0"),
    ({"trial_examples": 10}, ValueError, "trial_examples=10: the probe has 10 safety examples"),
    ({"curvature": "hessian"}, ValueError, 'curvature="hessian"'),
    ({"seed": "a"}, ValueError, "seed='a'"),
    ({"probe": None}, TypeError, "probe=NoneType"),
]


@names
@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_arguments_name_themselves(name, options, error, message):
    with pytest.raises(error, match=message):
        build(name, **options)


def test_more_wrong_arguments():
    model = tiny_llama(layers=1)
    for argument in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{argument}=True"):
            ProjectedAdamW(model.parameters(), probe=probe_of(model), **{argument: True})
    with pytest.raises(TypeError, match=r"optimizer=Linear: expected a torch\.optim\.Optimizer"):
        safeguard(nn.Linear(1, 1), probe_of(model))
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="options: ranks is unknown; expected some of: rank"):
        safeguard(sgd, probe_of(model), ranks=3)
    assert not hasattr(sgd, "safety")


@names
def test_parameters_that_cannot_be_protected(name):
    model = tiny_llama(layers=1)
    stranger = nn.Parameter(torch.zeros(3))
    _, optimizer = build(name, model=model, params=[*trainable(model), stranger])
    stranger.grad = torch.ones(3)
    before = copies([*model.parameters(), stranger])
    with pytest.raises(ValueError, match=r"params: 1 of .* do not belong to the probe's model"):
        optimizer.step()
    assert equal([*model.parameters(), stranger], before)
    params = [{"params": trainable(model), "protect": False}]
    _, optimizer = build(name, model=model, params=params)
    with pytest.raises(ValueError, match="params: no parameter is left to protect"):
        optimizer.step()


def test_defaults_are_the_same_everywhere():
    model = tiny_llama(layers=1)
    probe = SafetyProbe(model, [safety_batch()])
    optimizer = ProjectedAdamW(model.parameters(), probe=probe)
    assert optimizer.safety.config == SafetyConfig()
    guarded = safeguard(torch.optim.SGD(model.parameters()), probe)
    assert guarded.safety.config == SafetyConfig()
