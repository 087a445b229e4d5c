"""`torch.compile` of the training step: the model, the loss and the optimizer's step."""

import shutil

import pytest
import torch
from crash_run import Net, losses
from optimizer_table import OPTIMIZERS, build
from tiny_models import VOCAB, safety_batch

from safeopt import RefreshPolicy, SafetyProbe

STEPS = 5


def start(name):
    model = Net().train(False)  # no dropout, whose draws differ between compiled and plain code
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)], loss=losses)
    return build(name, model=model, probe=probe, refresh=RefreshPolicy.fixed(2), trial_examples=2)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, VOCAB, (4, 8), generator=generator) for _ in range(STEPS)]


def compare(name, backend):
    """A compiled run beside a plain one: same losses, history and parameters."""
    torch._dynamo.reset()
    model, optimizer = start(name)
    plain, reference = start(name)

    def whole(one, its):
        def step(ids):
            its.zero_grad()
            loss = losses(one, {"input_ids": ids, "labels": ids}).mean()
            loss.backward()
            its.step()
            return loss.detach()

        return step

    compiled = torch.compile(whole(model, optimizer), backend=backend)
    expected = whole(plain, reference)
    for ids in batches():
        assert float(compiled(ids)) == pytest.approx(float(expected(ids)), rel=1e-5)
    assert [e.step for e in optimizer.safety.history] == [0, 2, 4]
    assert optimizer.safety.step_count == STEPS
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_training_step_is_the_plain_one(name, backend):
    compare(name, backend)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")
@pytest.mark.parametrize("name", ["ProjectedAdamW", "PreconditionedSGD"])
def test_with_inductor(name):
    compare(name, "inductor")
