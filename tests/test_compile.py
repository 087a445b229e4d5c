"""`torch.compile` of the model, and of a training step with the optimizer's step in it."""

import copy
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from crash_run import Net, losses
from optimizer_table import OPTIMIZERS, build
from tiny_models import (
    VOCAB,
    safety_batch,
    task_step,
    tiny_gpt2,
    tiny_llama,
    trainable,
    with_lora,
)
from torch import nn

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM
from safeopt.curvature.operators import HessianOperator
from safeopt.distributed import undivided

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


def untouched(model, backend):
    return model


def as_a_module(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def layer_by_layer(model, backend):
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    return model


def start_compiled(prepare, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return prepare(with_lora(tiny_llama(layers=1)), backend)


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step_a_compiled_model(prepare, mode, backend):
    """Steps of an ordinary loop; the protected optimizer."""
    model = start_compiled(prepare, backend)
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)])
    options = {"lr": 1e-2, "probe": probe, "rank": 4, "refresh": RefreshPolicy.fixed(2)}
    if mode is None:
        optimizer = ProjectedAdamW(trainable(model), **options)
    else:
        optimizer = SafetySAM(trainable(model), mode=mode, **options)
    for step in range(STEPS):
        optimizer.step(partial(task_step, model, step))
    optimizer.restore()
    return optimizer


def compare_models(prepare, mode, backend):
    model = start_compiled(prepare, backend)
    task_step(model, 0)
    graphs = compiled_graphs()
    optimizer = step_a_compiled_model(prepare, mode, backend)
    assert compiled_graphs() == graphs > 0, "safety passes are not compiled"
    plain = step_a_compiled_model(untouched, mode, backend)
    safety, its = optimizer.safety, plain.safety
    assert safety.passes.forward == its.passes.forward, "the hooks are seen: no loop over examples"
    assert [entry.step for entry in safety.history] == [0, 2, 4, 5]
    for one, other in zip(safety.history, its.history, strict=True):
        assert one.alignment_loss == pytest.approx(other.alignment_loss, rel=1e-4)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, plain)), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "lookahead", "two_pass"])
@pytest.mark.parametrize("prepare", [as_a_module, in_place, layer_by_layer])
def test_a_compiled_model_is_trained_as_the_plain_one(prepare, mode):
    compare_models(prepare, mode, "aot_eager")


def test_padding_does_not_matter_to_a_compiled_model():
    """Learned positions are counted from the first token, not from the padding before it."""
    model = tiny_gpt2().eval()
    values = [SafetyProbe(m, [safety_batch()]).values() for m in (model, torch.compile(model))]
    assert torch.equal(*values)


def test_a_model_that_was_wrapped_before_it_was_compiled(tmp_path):
    """Accelerate does both in this order. Its ranks share the examples as those of plain DDP do."""
    model = tiny_llama()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        found = undivided(torch.compile(wrapped, backend="eager"))
        assert found == (model, wrapped.process_group)
    finally:
        dist.destroy_process_group()
    parallel = torch.compile(nn.DataParallel(model), backend="eager")
    assert undivided(parallel) == (model, None)


def test_products_of_a_compiled_model():
    """No second derivative goes through compiled code: the products run the model as written."""
    torch._dynamo.reset()
    plain = with_lora(tiny_llama(layers=1))
    compiled = as_a_module(copy.deepcopy(plain), "aot_eager")
    found = []
    for model in (plain, compiled):
        operator = HessianOperator(
            model,
            [safety_batch()],
            loss="causal_lm",
            params=lambda name: "lora" in name,
            products="double",
        )
        generator = torch.Generator().manual_seed(0)
        vector = [torch.randn(p.shape, generator=generator) for p in trainable(model)]
        found.append(operator.matvec(vector))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="it compiles C++ on a CPU")


@inductor
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ProjectedAdamW", "PreconditionedSGD"])
def test_a_training_step_with_inductor(name):
    compare(name, "inductor")


@inductor
@pytest.mark.slow
def test_a_model_with_inductor():
    compare_models(as_a_module, None, "inductor")
