"""Every protected optimizer in one table, and the runs that its tests are made of."""

from __future__ import annotations

import torch
from tiny_models import safety_batch, task_step, tiny_llama, trainable

from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe, safeguard

NEVER = RefreshPolicy.fixed(10**6)


def _projected(params, lr, options):
    options = dict(options)
    if "restore" in options:
        options["restore_alignment"] = options.pop("restore")
    return ProjectedAdamW(params, lr=lr, **options)


# name: (build(params, lr, options), the same optimizer without protection)
OPTIMIZERS = {
    "ProjectedAdamW": (_projected, lambda params, lr: torch.optim.AdamW(params, lr=lr)),
    "safeguard(AdamW)": (
        lambda params, lr, options: safeguard(torch.optim.AdamW(params, lr=lr), **options),
        lambda params, lr: torch.optim.AdamW(params, lr=lr),
    ),
    "safeguard(SGD)": (
        lambda params, lr, options: safeguard(
            torch.optim.SGD(params, lr=lr, momentum=0.9), **options
        ),
        lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    ),
}


def probe_of(model, *, held=False, **options):
    """Ten safety examples of several lengths."""
    batches = [safety_batch(), safety_batch(seed=1)]
    return SafetyProbe(model, batches, held=[safety_batch(seed=2)] if held else (), **options)


def build(name, *, model=None, lr=1e-2, held=False, params=None, **options):
    """A model and its protected optimizer."""
    model = tiny_llama(layers=1) if model is None else model
    options = {"probe": probe_of(model, held=held), "rank": 8, **options}
    return model, OPTIMIZERS[name][0](params or trainable(model), lr, options)


def run(model, optimizer, steps, start=0):
    """Steps of the random task; returns its losses."""
    losses = []
    for step in range(start, start + steps):
        losses.append(float(task_step(model, step)))
        optimizer.step()
    return losses


def copies(params):
    return [p.detach().clone() for p in params]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
