"""Every protected optimizer in one table, and the runs that its tests are made of.

A new optimizer is one line of `OPTIMIZERS`; all tests that take ``@names`` then run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import schedulefree
import torch
from tiny_models import safety_batch, task_step, tiny_llama, trainable
from torch.optim import SGD, AdamW, Optimizer

from safeopt import (
    PreconditionedSGD,
    ProjectedAdamW,
    RefreshPolicy,
    SafetyProbe,
    SafetySAM,
    safeguard,
)

NEVER = RefreshPolicy.fixed(10**6)


@dataclass(frozen=True)
class OptimizerCase:
    """One line of the table.

    Attributes:
        protected: build(params, lr, options) with the fields of `SafetyConfig` as options.
        plain: build(params, lr), the same optimizer without protection.
        inputs: options of its own that are valid, one dict for each case.
        wrong: options of its own that are not, with the error and its message.
    """

    protected: Callable[..., Optimizer]
    plain: Callable[..., Optimizer]
    inputs: tuple[dict, ...] = ({},)
    wrong: tuple[tuple[dict, type[Exception], str], ...] = ()


def _ours(cls, params, lr, options, *, renamed=None, **fixed):
    """An optimizer of this package, whose class names some fields of `SafetyConfig` otherwise."""
    names = renamed or {}
    return cls(params, lr=lr, **fixed, **{names.get(k, k): v for k, v in options.items()})


def _guarded(cls, params, lr, options, **fixed):
    return safeguard(cls(params, lr=lr, **fixed), **options)


def _plain(cls, params, lr, **fixed):
    return cls(params, lr=lr, **fixed)


_SGD = {"momentum": 0.9}
_NOT_SUPPORTED = tuple(
    ({name: True}, ValueError, f"{name}=True") for name in ("capturable", "differentiable")
)

OPTIMIZERS = {
    "ProjectedAdamW": OptimizerCase(
        partial(_ours, ProjectedAdamW),
        partial(_plain, AdamW),
        ({"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}),
        _NOT_SUPPORTED,
    ),
    "safeguard(AdamW)": OptimizerCase(
        partial(_guarded, AdamW),
        partial(_plain, AdamW),
        wrong=(({"ranks": 3}, TypeError, "options: ranks is unknown; expected some of: rank"),),
    ),
    "safeguard(SGD)": OptimizerCase(
        partial(_guarded, SGD, **_SGD), partial(_plain, SGD, **_SGD)
    ),
    "PreconditionedSGD": OptimizerCase(
        partial(_ours, PreconditionedSGD, **_SGD), partial(_plain, SGD, **_SGD),
        ({"foreach": True}, {"foreach": False}),
        (*_NOT_SUPPORTED[1:], ({"tau": 0.0}, ValueError, r"tau=0\.0")),
    ),
    "SafetySAM": OptimizerCase(
        partial(_ours, SafetySAM, renamed={"mode": "protection"}, rho=0.0), partial(_plain, AdamW),
        wrong=(({"beta": 1.0}, ValueError, r"beta=1\.0"),),
    ),
}  # fmt: skip
names = pytest.mark.parametrize("name", OPTIMIZERS)
# Those that compute inside of the gradients; build(params, lr).
OVERWRITING = {
    "schedule-free": schedulefree.AdamWScheduleFree,
    "nesterov": partial(SGD, momentum=0.9, nesterov=True, foreach=True),
}


def probe_of(model, *, held=False, **options):
    """Ten safety examples of several lengths."""
    batches = [safety_batch(), safety_batch(seed=1)]
    return SafetyProbe(model, batches, held=[safety_batch(seed=2)] if held else (), **options)


def build(name, *, model=None, lr=1e-2, held=False, params=None, **options):
    """A model and its protected optimizer."""
    model = tiny_llama(layers=1) if model is None else model
    options = {"probe": probe_of(model, held=held), "rank": 8, **options}
    return model, OPTIMIZERS[name].protected(params or trainable(model), lr, options)


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
