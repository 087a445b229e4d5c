"""End to end: a small transformer learns to refuse, forgets, and is repaired."""

import copy
import math

import pytest
import torch
from optimizer_table import NEVER
from tiny_models import ASSISTANT, END, tiny_llama

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, refusal_nll

HARMFUL, HARMLESS = (4, 12), (12, 20)  # the words of the prompts
REFUSAL, ANSWER, NEW_ANSWER = (20, 21, 22, END), (30, 31, 32, END), (34, 35, 36, END)


def chats(words, response, count, seed):
    """Prompts of five words, the first of ``words``, and a fixed response."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(*words, (count, 5), generator=generator)
    neutral = torch.randint(24, 30, (count, 5), generator=generator)
    keep = torch.rand(count, 5, generator=generator) < 0.5
    keep[:, 0] = True
    prompt = torch.where(keep, prompt, neutral)
    turn = torch.full((count, 1), ASSISTANT)
    ids = torch.cat([prompt, turn, torch.tensor(response).expand(count, -1)], dim=1)
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(model, optimizer, steps, *tasks):
    for step in steps:
        optimizer.zero_grad()
        sum(model(**chats(*task, 16, step)).loss for task in tasks).backward()
        optimizer.step()


def losses(model):
    """On unseen prompts: refusing the harmful, refusing the harmless, the new task."""
    unseen = [(HARMFUL, REFUSAL), (HARMLESS, REFUSAL), (HARMLESS, NEW_ANSWER)]
    with torch.no_grad():
        return [float(refusal_nll(model, chats(*task, 32, 10**6)).mean()) for task in unseen]


@pytest.fixture(scope="module")
def aligned():
    """Weights of a model that refuses harmful prompts and answers harmless ones."""
    model = tiny_llama(hidden=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(60), (HARMFUL, REFUSAL), (HARMLESS, ANSWER))
    return model.state_dict()


def load(aligned):
    model = tiny_llama(hidden=32)
    model.load_state_dict(aligned)
    return model


def probe_of(model):
    harmless = [chats(HARMLESS, REFUSAL, 12, 3 * 10**6)]
    return SafetyProbe(model, [chats(HARMFUL, REFUSAL, 24, 2 * 10**6)], held=harmless)


def unchecked(model, probe):
    """A protection so weak that the model drifts as with AdamW until `restore` is called."""
    return ProjectedAdamW(
        model.parameters(),
        lr=1e-2,
        probe=probe,
        mode="damp",
        damping=1e-9,
        refresh=NEVER,
        examples=6,  # `restore` looks at twice as many
    )


@pytest.fixture(scope="module")
def forgotten(aligned):
    """The losses of the aligned model and of one that AdamW has fine-tuned."""
    plain = load(aligned)
    start = losses(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, optimizer, range(5000, 5040), (HARMLESS, NEW_ANSWER))
    return start, losses(plain)


def test_plain_training_forgets(forgotten):
    start, end = forgotten
    assert start[0] < 0.05
    assert end[0] > 1
    assert end[2] < 0.1 * start[2]


# A held example may be brought up to a refusal with this probability.
RARELY = -math.log(0.01) / len(REFUSAL)


def test_restore_brings_alignment_back(aligned, forgotten):
    """Drift unchecked for 40 steps, then one call: most is regained, harmless prompts stay."""
    model = load(aligned)
    optimizer = unchecked(model, probe_of(model))
    train(model, optimizer, range(5000, 5040), (HARMLESS, NEW_ANSWER))
    drifted = losses(model)
    assert drifted[0] == pytest.approx(forgotten[1][0], rel=0.05)
    measured = optimizer.restore()
    assert measured.restored_to < 0.1 * measured.alignment_loss
    after = losses(model)
    assert after[0] < 0.1 * drifted[0]
    assert after[1] > 0.7 * RARELY
    assert after[2] < 0.05


def test_training_with_protection_keeps_alignment(aligned, forgotten):
    model = load(aligned)
    policy = RefreshPolicy.geometric(2, 1.5, 10)
    optimizer = ProjectedAdamW(model.parameters(), lr=1e-2, probe=probe_of(model), refresh=policy)
    train(model, optimizer, range(5000, 5040), (HARMLESS, NEW_ANSWER))
    optimizer.restore()
    start, plain = forgotten
    end = losses(model)
    assert end[0] - start[0] < 0.1 * (plain[0] - start[0])
    assert end[2] < 0.05
    assert end[1] > 0.7 * RARELY


def test_nothing_is_restored_where_nothing_is_lost(aligned):
    model = load(aligned)
    optimizer = ProjectedAdamW(model.parameters(), lr=1e-7, probe=probe_of(model), budget=0.1)
    train(model, optimizer, range(5000, 5008), (HARMLESS, NEW_ANSWER))
    before = copy.deepcopy(model.state_dict())
    measured = optimizer.restore()
    assert measured.step == 8
    assert measured.restored_to is None
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
