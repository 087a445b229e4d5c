"""Which groups and parameters of an optimizer are protected, and what can be protected at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.optim.geometry import SafetyGeometry


def is_protected(group: Mapping[str, Any]) -> bool:
    """Whether a group is not exempted by ``protect=False``."""
    return bool(group.get("protect", True))


def protected_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups that are not exempted by ``protect=False``."""
    return [group for group in optimizer.param_groups if is_protected(group)]


def protected_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters of all groups that are trained and not exempted by ``protect=False``.

    Raises:
        ValueError: if none is left.
    """
    params = trained_parameters(optimizer)
    if not params:
        raise ValueError("params: no parameter is left to protect; all are frozen or protect=False")
    return params


def trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The `protected_parameters`, of which none may be left: a model is frozen to be saved.

    Each once: torch only warns of a group that names one twice, as of tied weights, and a step back
    would be taken twice.
    """
    named = (p for group in protected_groups(optimizer) for p in group["params"] if p.requires_grad)
    return list(dict.fromkeys(named))


def spanned_parameters(optimizer: Optimizer, geometry: SafetyGeometry) -> list[Tensor]:
    """The `protected_parameters`: those of the subspace, in its order, if there is one.

    Raises:
        ValueError: if none is left, or some were added, frozen or resized since the first estimate.
    """
    params = protected_parameters(optimizer)
    known, given = ({id(p) for p in x} for x in (geometry.spanned, params))
    if geometry.subspace is not None and known != given:
        raise ValueError(
            f"params: {len(given - known)} protected parameters were added and "
            f"{len(known - given)} removed or frozen since the safety subspace was first "
            "estimated, and what the aligned model's loss does along new ones is not known. "
            "Add groups with protect=False, or give the optimizer all protected parameters, "
            "trainable, before its first step"
        )
    if geometry.subspace is None:
        return params
    for p, shape in zip(geometry.spanned, geometry.shapes, strict=True):
        if p.shape != shape:  # as `resize_token_embeddings` of transformers does, in place
            raise ValueError(
                f"params: a protected parameter of shape {tuple(shape)} has become one of "
                f"{tuple(p.shape)} since the safety subspace was first estimated. Resize the "
                "model before the optimizer is made"
            )
    return geometry.spanned


def loaded_parameters(optimizer: Optimizer, geometry: SafetyGeometry) -> list[Tensor]:
    """The parameters that a state is loaded for, of which none may be left.

    Those of the subspace, where the optimizer still has them: some may be frozen by now.
    """
    here = {id(p) for group in protected_groups(optimizer) for p in group["params"]}
    if geometry.spanned and all(id(p) in here for p in geometry.spanned):
        return geometry.spanned
    return trained_parameters(optimizer)


def largest_learning_rate(optimizer: Optimizer, name: str = "lr") -> float:
    """The largest learning rate of the protected groups that have something to train; else 0.

    Args:
        optimizer: whose groups.
        name: under which they keep it.

    Raises:
        ValueError: if one of them has no learning rate.
    """
    trained = [
        group
        for group in protected_groups(optimizer)
        if any(p.requires_grad for p in group["params"])
    ]
    return max((float(_learning_rate(group, name)) for group in trained), default=0.0)


def _learning_rate(group: Mapping[str, Any], name: str = "lr") -> float | Tensor:
    """A group's learning rate, as it is kept.

    Raises:
        ValueError: if it has none.
    """
    rate: float | Tensor | None = group.get(name)
    if rate is None:
        raise ValueError(
            "lr=None: the learning rate has to be known, and this optimizer picks its own; give lr "
            "a number (Adafactor of transformers: with relative_step=False), or use protect=False"
        )
    return rate


def check_groups(optimizer: Optimizer) -> None:
    """Refuse protected groups with options or parameters that cannot be protected.

    Raises:
        ValueError: if one is ``capturable`` or ``differentiable``, or has no learning rate.
        TypeError: for complex or sparse parameters.
    """
    for group in protected_groups(optimizer):
        _learning_rate(group)
        for name in ("capturable", "differentiable"):
            if group.get(name):
                raise ValueError(
                    f"{name}=True: a protected step reads k numbers on the host and cannot be "
                    "captured or differentiated; leave it False, or use protect=False"
                )
        trained = [p for p in group["params"] if p.requires_grad]
        if any(p.is_complex() or p.layout != torch.strided for p in trained):
            raise TypeError(
                "params: complex and sparse parameters cannot be protected; use protect=False"
            )
