"""How a `SafetyGeometry` is attached to a torch optimizer: by the optimizer's own step hooks.

Nothing is wrapped: the optimizer keeps its class, its ``param_groups`` and its state, so
schedulers, `GradScaler`, Accelerate and checkpointing treat it as before. The geometry's state
travels in the optimizer's ``state_dict`` under the key ``"safety"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.optim.geometry import Measurement, SafetyGeometry
from safeopt.optim.state import check_state, load_state, pack_state

_KEY = "safety"


def protected_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters of all groups that are trained and not exempted by ``protect=False``.

    Raises:
        TypeError: for complex parameters.
        ValueError: if none is left, or one does not belong to the probe's model.
    """
    params = [
        p
        for group in optimizer.param_groups
        if group.get("protect", True)
        for p in group["params"]
        if p.requires_grad
    ]
    for p in params:
        if p.is_complex():
            raise TypeError("params: complex parameters cannot be protected; use protect=False")
    if not params:
        raise ValueError("params: no parameter is left to protect; all are frozen or protect=False")
    return params


def attach(optimizer: Optimizer, geometry: SafetyGeometry) -> None:
    """Protect ``optimizer``'s parameters from now on.

    Before its first step the safety subspace is estimated at the aligned model; after each step the
    parameters are mapped back. A step without any gradient, or with every learning rate zero, is
    left alone: it moves nothing and is not counted.
    """
    if not geometry.active:
        return

    def idle(instance: Optimizer) -> bool:
        params = protected_parameters(instance)
        return all(p.grad is None for p in params) or not _learning_rate(instance) > 0

    def before(instance: Optimizer, args: Any, kwargs: Any) -> None:
        given = args[1:] or (kwargs.get("closure"),)  # args starts with the optimizer itself
        has_closure = given[0] is not None
        if not idle(instance) or (has_closure and _learning_rate(instance) > 0):
            geometry.before_step(protected_parameters(instance))

    def after(instance: Optimizer, args: Any, kwargs: Any) -> None:
        if not idle(instance):
            geometry.after_step(protected_parameters(instance), _learning_rate(instance))

    def save(instance: Optimizer, state: dict[str, Any]) -> None:
        state[_KEY] = pack_state(geometry)

    pending: dict[str, Any] = {}

    def check(instance: Optimizer, state: dict[str, Any]) -> None:
        pending.clear()
        if _KEY not in state:
            raise ValueError(
                'state_dict: it has no "safety" entry; it was saved by an unprotected optimizer, '
                "and the alignment loss before fine-tuning is not known. Start from the aligned "
                "model, or from a checkpoint of a protected run"
            )
        check_state(state[_KEY], protected_parameters(instance), geometry.held_count)
        pending.update(state[_KEY])

    def load(instance: Optimizer) -> None:
        load_state(geometry, pending, protected_parameters(instance))
        pending.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(check)
    optimizer.register_load_state_dict_post_hook(load)


def restore(optimizer: Optimizer, geometry: SafetyGeometry) -> Measurement:
    """Measure the alignment loss now and restore it where it exceeds the budget.

    Call it before a checkpoint is saved and at the end of training.
    """
    return geometry.restore(protected_parameters(optimizer))


def _learning_rate(optimizer: Optimizer) -> float:
    """The largest learning rate of the protected groups."""
    rates = [group["lr"] for group in optimizer.param_groups if group.get("protect", True)]
    return max(float(rate) if isinstance(rate, torch.Tensor) else rate for rate in rates)
