"""Nothing depends on where torch makes tensors by default, which users set to their GPU.

The device "meta", whose tensors hold no numbers, stands for it: whatever was made there and is then
used raises an error, on any machine.
"""

from __future__ import annotations

import pytest
import torch
from optimizer_table import OPTIMIZERS, build, copies, equal
from tiny_models import safety_batch, single, tiny_llama, trainable, with_lora

from safeopt import RefreshPolicy, SafetyMonitor, SafetyProbe, diagnose, repair
from safeopt.curvature.density import hutch_pp, spectral_density
from safeopt.curvature.krylov import block_krylov, lanczos
from safeopt.curvature.operators import FisherOperator, GGNOperator, HessianOperator

TASK = {"input_ids": torch.arange(32).view(4, 8) % 30 + 2}
TASK["labels"] = TASK["input_ids"].clone()
HELD = [single(safety_batch(), row) for row in range(3)]
OPTIONS = {"trial_examples": 1, "examples": 2, "window": 4, "refresh": RefreshPolicy.fixed(2)}


def train(model, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = model(**TASK).loss
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def run(name, device, **options):
    """Train, save, load and restore."""
    model = tiny_llama() if options.get("basis") in ("factored", "compressed") else None
    model, optimizer = build(name, model=model, held=True, **{**OPTIONS, **options})
    with torch.device(device):
        train(model, optimizer, 5)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.safety.restore(trainable(model))
    return copies(trainable(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    assert equal(run(name, "cpu"), run(name, "meta"))


@pytest.mark.parametrize("basis", ["int8", "factored", "compressed"])
def test_storages(basis):
    assert equal(*(run("ProjectedAdamW", place, basis=basis) for place in ("cpu", "meta")))


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_probe(loss):
    model, batch = with_lora(tiny_llama()), safety_batch()
    with torch.device("meta"):
        probe = SafetyProbe(model, [batch], loss=loss)
        losses, _ = probe.per_example(trainable(model))
        assert torch.allclose(probe.factored(trainable(model))[0], losses)
        assert torch.allclose(probe.values(), losses)


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, FisherOperator])
def test_operators_and_solvers(kind):
    model, batch = with_lora(tiny_llama()), safety_batch()
    with torch.device("meta"):
        operator = kind(model, [batch], "causal_lm", params=trainable(model))
        dense = operator.to_dense().double()
        expected = float(torch.linalg.eigvalsh(dense).abs().max())
        for solve in (lanczos, block_krylov):
            assert float(solve(operator, 2).eigenvalues.abs()[0]) == pytest.approx(
                expected, rel=1e-3
            )
        assert hutch_pp(operator, 6).products == 6
        assert len(spectral_density(operator, steps=4, vectors=2).nodes) == 2


def test_diagnosis_repair_and_monitor():
    model = with_lora(tiny_llama())
    params, batch = trainable(model), safety_batch()
    with torch.device("meta"):
        probe = SafetyProbe(model, [batch], held=HELD)
        assert str(diagnose(probe, [TASK, TASK], params=params))
        repair(model, probe, task=[TASK], examples=2, trial_examples=1, task_examples=4)
        optimizer = torch.optim.SGD(params, lr=1e-2)
        monitor = SafetyMonitor(optimizer, probe, every=1, examples=2)
        for step in range(1, 4):
            train(model, optimizer, 1)
            assert monitor.check(step).step == step
