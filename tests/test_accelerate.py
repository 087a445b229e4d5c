"""Accelerate: prepared optimizers, accumulation, mixed precision, and resuming its states."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import safety_batch, tiny_llama, trainable, with_lora

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, SafetySAM, safeguard


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps one state for a process, with its mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows():
    ids = [(torch.arange(6) * (i + 3)) % 30 + 4 for i in range(24)]
    return [{"input_ids": x, "labels": x} for x in ids]


def optimizer_of(name, model):
    probe = SafetyProbe(model, [safety_batch(), safety_batch(seed=1)])
    options = {"rank": 4, "refresh": RefreshPolicy.fixed(2)}
    params = trainable(model)
    if name == "ProjectedAdamW":
        return ProjectedAdamW(params, lr=1e-2, probe=probe, **options)
    if name == "safeguard":
        return safeguard(torch.optim.SGD(params, lr=1e-1, momentum=0.9), probe, **options)
    return SafetySAM(params, lr=1e-2, probe=probe, mode=name, **options)


NAMES = ["ProjectedAdamW", "safeguard", "lookahead", "two_pass"]


def run(name, *, accumulate=2, precision="no", steps=6, save=None, load=None, start=0):
    """Steps of a prepared loop, each of ``accumulate`` micro-batches."""
    model = with_lora(tiny_llama())
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulate, mixed_precision=precision, cpu=True
    )
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)
    optimizer = optimizer_of(name, model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    inner = optimizer.optimizer
    if load is not None:
        accelerator.load_state(load)
        loader = accelerator.skip_first_batches(loader, start * accumulate)
    model.train()
    optimizer.train()
    kept = []
    for batch in loader:
        if inner.safety.step_count == steps:
            break
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            kept.append(batch)
            if name == "two_pass" and accelerator.sync_gradients:
                with inner.second_pass():
                    for again in kept:
                        accelerator.backward(model(**again).loss)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        kept = []
        if save is not None and inner.safety.step_count == 3:
            inner.restore()
            accelerator.save_state(save)
            optimizer.train()
    inner.restore()
    return [p.detach().clone() for p in trainable(model)], inner.safety


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    whole, safety = run(name, save=tmp_path)
    resumed, other = run(name, load=tmp_path, start=3)
    assert safety.step_count == other.step_count == 6
    assert safety.history == other.history
    assert all(map(torch.equal, whole, resumed))


def test_accumulation_counts_steps_and_equals_the_large_batch():
    small, safety = run("ProjectedAdamW", accumulate=2, steps=3)
    model = with_lora(tiny_llama())
    optimizer = optimizer_of("ProjectedAdamW", model)
    model.train()
    for batch in list(torch.utils.data.DataLoader(rows(), batch_size=4))[:3]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.restore()
    assert safety.step_count == 3
    for left, right in zip(small, trainable(model), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_the_probe_runs_in_the_mixed_precision_of_training():
    exact, safety = run("ProjectedAdamW", steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed, rounded = run("ProjectedAdamW", steps=3, precision="bf16")
    first, second = (s.history[0].alignment_loss for s in (safety, rounded))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
    assert {p.dtype for p in mixed} == {torch.float32}
    assert any(not torch.equal(*pair) for pair in zip(exact, mixed, strict=True))
