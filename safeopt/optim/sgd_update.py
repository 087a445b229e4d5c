"""One step of SGD with momentum and decoupled weight decay, which returns its directions.

`single_tensor_update` is the reference; `multi_tensor_update` does the same with few kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def single_tensor_update(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], group: dict[str, Any]
) -> list[Tensor]:
    """SGD with decoupled weight decay, as a reference; returns the directions d."""
    lr, momentum = float(group["lr"]), group["momentum"]
    directions = []
    for index, (p, grad) in enumerate(zip(params, grads, strict=True)):
        direction = -grad if group["maximize"] else grad
        if momentum != 0:
            buffer = buffers[index]
            if buffer is None:
                buffer = buffers[index] = direction.detach().clone()
            else:
                buffer.mul_(momentum).add_(direction, alpha=1 - group["dampening"])
            direction = direction.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if group["weight_decay"] != 0:
            p.mul_(1 - lr * group["weight_decay"])
        p.add_(direction, alpha=-lr)
        directions.append(direction)
    return directions


def multi_tensor_update(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], group: dict[str, Any]
) -> list[Tensor]:
    """The same, with few kernels for all parameters."""
    if not params:
        return []
    lr, momentum = float(group["lr"]), group["momentum"]
    directions = list(torch._foreach_neg(grads)) if group["maximize"] else grads
    if momentum != 0:
        kept = [buffer for buffer in buffers if buffer is not None]
        if kept:
            fresh = [d for d, b in zip(directions, buffers, strict=True) if b is not None]
            torch._foreach_mul_(kept, momentum)
            torch._foreach_add_(kept, fresh, alpha=1 - group["dampening"])
        for index, direction in enumerate(directions):
            if buffers[index] is None:
                buffers[index] = direction.detach().clone()
        filled = [buffer for buffer in buffers if buffer is not None]
        if group["nesterov"]:
            directions = list(torch._foreach_add(directions, filled, alpha=momentum))
        else:
            directions = filled
    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, directions, alpha=-lr)
    return directions
