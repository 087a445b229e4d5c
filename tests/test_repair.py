"""`safeopt.repair`: lost refusals come back, what was learned stays, nothing else is touched."""

# ruff: noqa: F811
from __future__ import annotations

import copy
import math

import pytest
import torch
from test_restore import (  # noqa: F401 - `aligned` is a fixture
    HARMFUL,
    HARMLESS,
    NEW_ANSWER,
    RARELY,
    REFUSAL,
    aligned,
    chats,
    load,
    losses,
    probe_of,
    train,
)
from tiny_models import safety_batch, tiny_llama, trainable, with_lora

from safeopt import SafetyProbe, repair
from safeopt.optim.examples import ExampleRota
from safeopt.optim.repair import _inverse_root

TASK = [chats(HARMLESS, NEW_ANSWER, 64, 4 * 10**6)]


@pytest.fixture(scope="module")
def broken(aligned):
    """Weights of the aligned model after it has learned a task, and both models' losses."""
    model = load(aligned)
    start = losses(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(5000, 5040), (HARMLESS, NEW_ANSWER))
    return model.state_dict(), start, losses(model)


def repaired(broken, **options):
    model = load(broken[0])
    report = repair(model, probe_of(model), reference=broken[1][0], **options)
    return model, report


def test_lost_refusals_come_back_and_the_task_stays(broken):
    _, start, lost = broken
    assert lost[0] > 20 * start[0]
    model, report = repaired(broken, task=TASK)
    after = losses(model)
    assert after[0] - start[0] < 0.05 * (lost[0] - start[0])
    assert after[1] > 0.7 * RARELY, "harmless prompts are still answered"
    assert after[2] - lost[2] < 0.02 * start[2], "the task's own gain is kept"
    assert 1 <= len(report.steps) <= 5
    assert report.alignment_after < 0.1 * report.alignment_before
    assert report.task_after - report.task_before < 0.02 * start[2]


def test_task_examples_save_the_task(broken):
    """Without them the same steps cost more of it."""
    costs = []
    for task in ((), TASK):
        model, report = repaired(broken, task=task, budget=0.05)
        costs.append(losses(model)[2] - broken[2][2])
        assert (report.task_before is None) == (not task)
    assert costs[1] < 0.5 * costs[0]


def test_it_stops_within_its_budget(broken):
    counts = []
    for budget in (10.0, 0.5, 0.01):
        model, report = repaired(broken, budget=budget)
        counts.append(len(report.steps))
        if counts[-1] == 0:
            assert all(torch.equal(broken[0][k], v) for k, v in model.state_dict().items())
        assert report.within_budget == (report.alignment_after <= report.reference + budget)
    assert counts[0] == 0
    assert counts[0] < counts[1] < counts[2] <= 5


def test_passes_are_as_stated(broken):
    model = load(broken[0])
    probe = SafetyProbe(model, [chats(HARMFUL, REFUSAL, 24, 7)], micro_batch_size=64)
    report = repair(model, probe, reference=0.0, budget=0.0, refreshes=2, trial_examples=4)
    assert len(report.steps) == 2
    tried = sum({1.0: 1, 0.5: 2, 0.25: 3, 0.0: 3}[step.length] for step in report.steps)
    assert report.passes["backward"] == 2
    assert report.passes["forward"] == 1 + 2 + tried
    assert [step.share for step in report.steps] == [0.5, 1.0]


@pytest.mark.parametrize("known", [True, False])
def test_what_the_aligned_model_refused_may_be_refused_again(aligned, broken, known):
    """Some held prompts sound so harmful that the aligned model refused them, too."""
    model = load(aligned)
    held = chats(HARMFUL, REFUSAL, 12, 3 * 10**6)

    def probe_of(model):
        return SafetyProbe(model, [chats(HARMFUL, REFUSAL, 24, 2 * 10**6)], held=[held])

    probe = probe_of(model)
    reference = probe.values(probe.indices)
    model.load_state_dict(broken[0])
    report = repair(model, probe, reference=reference if known else float(reference[:24].mean()))
    refused = probe.values(probe.indices)[24:]
    if known:
        assert report.alignment_after < 0.01 * report.alignment_before
        assert refused.mean() < 0.1 * RARELY
    else:  # no more than by the broken model: that holds the others back
        assert report.alignment_after > 0.1 * report.alignment_before
        assert refused.mean() > RARELY


def adapted(dtype=torch.float32):
    return with_lora(tiny_llama(dtype=dtype))


def test_an_adapter_is_repaired_towards_the_model_below_it(aligned):
    model = with_lora(load(aligned), random_b=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    train(model, optimizer, range(5000, 5020), (HARMLESS, NEW_ANSWER))
    probe = probe_of(model)
    with model.disable_adapter():
        reference = probe.value(ExampleRota(probe, 8, 0).trial)
    before, lost = copy.deepcopy(model.state_dict()), losses(model)
    assert lost[0] > 10 * reference
    for name, p in model.named_parameters():  # the user's choice: the adapter's input maps stay
        p.requires_grad_("lora_B" in name)
    report = repair(model, probe, task=TASK)
    assert all(p.requires_grad == ("lora_B" in name) for name, p in model.named_parameters())
    assert report.reference == pytest.approx(reference)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_B" in name for name in changed)
    after = losses(model)
    assert after[0] - reference < 0.1 * (lost[0] - reference)
    assert after[2] < 1.1 * lost[2]


def test_storages_agree(broken):
    ends = []
    for basis in ("dense", "factored"):
        model, report = repaired(broken, task=TASK, basis=basis, refreshes=2)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert len(report.steps) == 2
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


# --- the step ---


def test_the_metric_is_the_inverse_root_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    squares = torch.linalg.svdvals(rows).square()
    metric = torch.eye(7, dtype=torch.float64) + 1000 / squares.mean() * rows.T @ rows
    root = _inverse_root(rows)
    torch.testing.assert_close(root @ root, torch.linalg.inv(metric))
    torch.testing.assert_close(root, root.T)
    assert torch.equal(_inverse_root(rows[:0]), torch.eye(7, dtype=torch.float64))
    assert torch.equal(_inverse_root(0 * rows), torch.eye(7, dtype=torch.float64))


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def test_the_step_is_the_shortest_in_the_tasks_metric():
    """One lost example: the shortest way is M⁻¹∇A, against dense matrices of all parameters."""
    model = adapted(torch.float64)
    params = trainable(model)
    # The one that is not kept apart spans the subspace.
    probe = SafetyProbe(model, [safety_batch((5, 5), (3, 3))])
    task = safety_batch((3, 6, 4, 9), (4, 3, 2, 5), seed=5)
    start = flat(params)
    moved = []
    order = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
    _, gradient = probe.gradient(params, [order[1]])
    measured = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()[:1]
    steering = [i for i in range(4) if i not in measured]
    rows = SafetyProbe(model, [task]).per_example(params, steering).rows
    t = torch.cat([row.flatten(1) for row in rows], dim=1)
    squares = torch.linalg.svdvals(t).square()
    metric = torch.eye(len(start), dtype=torch.float64) + 1000 / squares.mean() * t.T @ t
    expected = -torch.linalg.solve(metric, flat(gradient))
    # A trial example like the lost one, so that the line search takes the step.
    trial = {k: v[[order[1]] * 2] for k, v in safety_batch((5, 5), (3, 3)).items()}
    probe = SafetyProbe(model, [trial])
    repair(model, probe, reference=0.0, task=[task], refreshes=1, trial_examples=1)
    moved = flat(params) - start
    cosine = torch.nn.functional.cosine_similarity(moved, expected, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert float((t @ moved).abs().max()) < 0.1 * float(t.norm(dim=1).min() * moved.norm())


def test_a_step_that_does_not_help_is_not_taken(broken, monkeypatch):
    model = load(broken[0])
    probe = probe_of(model)
    monkeypatch.setattr("safeopt.optim.repair._LENGTHS", (-1.0,))  # away from what was lost
    report = repair(model, probe, reference=0.0, refreshes=2)
    assert [step.length for step in report.steps] == [0.0, 0.0]
    assert report.alignment_after == report.alignment_before
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, broken[0][name], rtol=0, atol=1e-5)


# --- bad input ---


def test_an_exception_leaves_the_model_as_it_was(broken):
    calls = []

    def loss(model, batch):
        from safeopt import refusal_nll

        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return refusal_nll(model, batch)

    model = load(broken[0])
    probe = SafetyProbe(model, [chats(HARMFUL, REFUSAL, 24, 7)], loss)
    with pytest.raises(KeyboardInterrupt):
        repair(model, probe, reference=0.0)
    assert len(calls) == 5, "it was interrupted after a step"
    assert all(torch.equal(broken[0][k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_no_number_is_refused(broken):
    model = load(broken[0])
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError):
        repair(model, probe_of(model), reference=0.1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": -1}, "budget=-1"),
        ({"refreshes": 0}, "refreshes=0"),
        ({"examples": 0}, "examples=0"),
        ({"task_examples": 0}, "task_examples=0"),
        ({"trial_examples": 24}, "trial_examples=24: the probe has 24"),
        ({"newton_damping": 0}, "newton_damping=0"),
        ({"basis": "sparse"}, 'basis="sparse"'),
        ({"reference": None}, "reference=None: the model has no adapter"),
        ({"reference": torch.zeros(24)}, r"reference: shape \(24,\); expected \(36,\)"),
        ({"task": [chats(HARMLESS, NEW_ANSWER, 1, 1)]}, "task: 1 example"),
        ({"task": [{"input_ids": torch.ones(2, 3)}]}, "task: a batch has the keys"),
        ({"task": [1]}, "task: a batch is int; expected a list of dicts"),
    ],
)
def test_wrong_arguments_are_named(broken, options, words):
    model = load(broken[0])
    with pytest.raises(ValueError, match=words):
        repair(model, probe_of(model), **({"reference": 0.0} | options))


def test_the_model_must_be_the_probes_and_trainable(broken):
    model = load(broken[0])
    with pytest.raises(ValueError, match="probe: it looks at another model"):
        repair(load(broken[0]), probe_of(model), reference=0.0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: no parameter is trainable"):
        repair(model, probe_of(model), reference=0.0)
