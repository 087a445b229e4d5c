"""Models whose layers lie on several devices, which `devices` stands in for."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from devices import CPU, FIRST, SECOND, elsewhere, moved, on_cpu, simulated
from optimizer_table import OPTIMIZERS, build
from tiny_models import VOCAB, safety_batch, trainable
from torch import nn

from safeopt import RefreshPolicy, SafetyProbe, diagnose, repair

Output = namedtuple("Output", "logits")
OPTIONS = {"trial_examples": 1, "examples": 2, "window": 4, "refresh": RefreshPolicy.fixed(2)}
# Of the embedding, the first layer, the second one, the head and the logits.
PLACES = {
    "one": [FIRST] * 5,
    "two": [FIRST, FIRST, SECOND, SECOND, SECOND],
    "head_back": [FIRST, SECOND, SECOND, FIRST, SECOND],
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Spread(nn.Module):
    """Each layer fetches its input, behind the hooks, as Accelerate's dispatched models do."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.first, self.second = Layer(), Layer()
        self.places = places
        layers = (self.embedding, self.first, self.second, self.head)
        for layer, place in zip(layers, places, strict=False):
            elsewhere(layer, place)
            layer.forward = self.fetching(layer.forward, place)

    @staticmethod
    def fetching(forward, place):
        return lambda x: forward(moved(x, place))

    def forward(self, input_ids, attention_mask=None):
        x = self.second(self.first(self.embedding(input_ids)))
        return Output(moved(self.head(x), self.places[-1]))


def train(name, places, *, frozen=False, **options):
    """Train, save, load and restore; the parameters' numbers."""
    model = Spread(places)
    if frozen:
        model.embedding.requires_grad_(False)
        model.first.requires_grad_(False)
    model, optimizer = build(name, model=model, **{**OPTIONS, **options})

    def closure():
        optimizer.zero_grad()
        ids = torch.arange(12).view(2, 6) + 5
        logits = model(moved(ids, places[0])).logits
        targets = moved(ids[:, 1:].flatten(), places[-1])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.safety.restore(trainable(model))
    return [on_cpu(p.detach()) for p in model.parameters()]


def close(one, two, tolerance=1e-5):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    expected = train(name, [CPU] * 5)
    with simulated():
        assert close(train(name, PLACES["head_back"]), expected)


@pytest.mark.parametrize(
    ("places", "frozen"), [("one", False), ("two", True), ("head_back", False)]
)
@pytest.mark.parametrize("basis", ["dense", "int8", "factored", "compressed"])
def test_storages(basis, places, frozen):
    """Also where the first device, that of the examples, has no trained parameter."""
    options = {"basis": basis, "frozen": frozen}
    expected = train("ProjectedAdamW", [CPU] * 5, **options)
    with simulated():
        found = train("ProjectedAdamW", PLACES[places], **options)
    assert close(found, expected, 1e-3 if basis == "int8" else 1e-5)  # sums round to other codes


def test_diagnosis_and_repair():
    batch = safety_batch()
    found = []
    for where in ([CPU] * 5, PLACES["head_back"]):
        with simulated():
            model = Spread(where)
            probe = SafetyProbe(model, [batch])
            assert str(diagnose(probe, [batch, batch], params=trainable(model)))
            options = {"examples": 2, "trial_examples": 1, "task_examples": 2}
            repair(model, probe, reference=0.1, task=[batch], refreshes=2, **options)
            found.append([on_cpu(p.detach()) for p in model.parameters()])
    assert close(*found)
