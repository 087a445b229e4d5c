"""Passes through a model that leave no trace on it.

Parameters, gradients, buffers, random state and train/eval mode are as before afterwards, also
when something raises in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Outside, the parameters train or not as they did, whatever happens to them inside."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, trains in before:
            p.requires_grad_(trains)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Outside, the module and those inside of it have the attributes and buffers that they had.

    Attributes that are lists, dicts or sets have the entries that they had, too.
    """
    parts = [vars(part) for part in module.modules()]
    buffers: list[Any] = [part._buffers for part in module.modules()]
    own = [x for part in parts for name, x in part.items() if name not in _OF_EVERY_MODULE]
    changing = [x for x in own if isinstance(x, (list, dict, set))]
    before = [(x, copy(x)) for x in (*parts, *buffers, *changing)]
    try:
        yield
    finally:
        for container, entries in before:
            if isinstance(container, list):
                container[:] = entries
                continue
            for added in set(container) - set(entries):
                container.pop(added) if isinstance(container, dict) else container.remove(added)
            container.update(entries)


@contextmanager
def untouched(model: nn.Module, *, checkpointing: bool = True) -> Iterator[None]:
    """Evaluation mode and a fixed random seed inside; everything as before outside.

    From torch 2.6 on compiled models run as they are written: hooks would not be seen by compiled
    code, and no second derivative goes through it.

    Some layers look at their own ``training`` flag, so that flag alone is on for them:

    - those with Hugging Face's gradient checkpointing switched on, since the memory they save is
      needed here most. One that would also apply dropout by that flag runs in evaluation mode,
      without checkpointing;
    - 4-bit layers of bitsandbytes, which in evaluation mode rewrite their weights for a faster
      kernel on some CPUs: one that has coarser numbers and no second derivative.

    Args:
        model: the module whose state is kept.
        checkpointing: False runs without gradient checkpointing.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module, _ in modes]
    values = [
        (buffer, buffer.clone(), buffer._version)
        for _, named in buffers
        for buffer in named.values()
        if buffer is not None
    ]
    # A solver comes through here at every product: what is as it should be is not written again.
    training_now = any(training for _, training in modes)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # New in torch 2.6; it acts from here on until it is left.
    eager = getattr(torch.compiler, "set_stance", lambda stance: nullcontext())("force_eager")
    try:
        with eager, torch.random.fork_rng(devices=devices):
            # Equal passes give equal products, whatever the model draws. `torch.manual_seed` would
            # also seed what is not put back, such as a GPU that is first used later.
            torch.default_generator.manual_seed(0)
            if devices:
                torch.cuda.manual_seed_all(0)
            if training_now:
                model.eval()
            for module, training in modes:
                checkpoints = checkpointing and training and _checkpoints(module)
                if checkpoints or hasattr(module, "support_avx512bf16_for_cpu"):
                    module.training = True
            yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for buffer, before, version in values:
                if buffer._version != version:
                    buffer.copy_(before)
            for module, named in buffers:
                module._buffers.update(named)  # some modules put another tensor in its place


def _checkpoints(module: nn.Module) -> bool:
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    config = getattr(module, "config", None)
    settings = {**(vars(config) if config is not None else {}), **vars(module)}
    return not any("drop" in k and v for k, v in settings.items() if isinstance(v, float))
