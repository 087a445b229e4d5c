"""`safeguard`: the same protection around an optimizer that the user already has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam

from safeopt.optim.config import SafetyConfig
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.protection import OnRefreshError, attach, restore
from safeopt.probe import SafetyProbe

_REFUSED = {
    LBFGS: "its curvature pairs assume that nothing else moves the parameters",
    SparseAdam: "sparse gradients cannot be protected",
}


def safeguard(
    optimizer: Optimizer,
    probe: SafetyProbe,
    *,
    on_refresh_error: OnRefreshError = "raise",
    **options: Any,
) -> Optimizer:
    """Protect the parameters of any torch optimizer.

    Any optimizer whose parameters, between its steps, are the model: all of ``torch.optim`` except
    LBFGS and SparseAdam, 8-bit and paged ones, Lion, Muon, …. With schedule-free optimizers, which
    train at one point and deploy another, the deployed one is protected, see
    `safeopt.optim.schedule_free`. An optimizer that wraps another one (Lookahead, Accelerate's) is
    refused: protect the one inside before it is wrapped.

    Args:
        optimizer: an optimizer that has taken no step yet; it is changed, not wrapped. Groups with
            ``protect=False`` are left as they are. A group with ``lr=0`` is not: the map after a
            step, refreshes and restoring move all protected groups. To keep one still, use
            ``protect=False``, or ``requires_grad_(False)`` before the first step. Protected
            parameters cannot be added after the first step.
        probe: the safety examples; its model holds the optimizer's parameters.
        on_refresh_error: ``"raise"``, or ``"warn"`` to train on without protection where a refresh
            or a gradient fails, see `safeopt.optim.protection`.
        **options: fields of `SafetyConfig`: ``rank``, ``mode``, ``damping``, ``budget``, ….

    Returns:
        ``optimizer`` itself, now with the attribute ``safety`` (its `SafetyGeometry`) and the
        method ``restore()``, see `ProjectedAdamW.restore`. Copies and pickles of it are protected
        too: copy it together with its model, ``copy.deepcopy((model, optimizer))``.

    Raises:
        TypeError: if ``optimizer`` is not a torch optimizer or cannot be protected, an option is
            unknown, or a protected parameter is complex or sparse.
        ValueError: if an option is out of its range, the optimizer is protected already, or a
            protected group is ``capturable`` or ``differentiable``, or has ``lr=None``.

    Cost: as `ProjectedAdamW`.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer")
    if hasattr(optimizer, "safety"):
        raise ValueError("optimizer: it is protected already; call safeguard once")
    name = type(optimizer).__name__
    for refused, why in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise TypeError(f"optimizer={name}: {why}; use another one")
    for attribute in ("optimizer", "base_optimizer"):
        if isinstance(getattr(optimizer, attribute, None), Optimizer):
            raise TypeError(
                f"optimizer={name}: it wraps another optimizer; safeguard that one, and wrap it "
                "afterwards"
            )
    geometry = SafetyGeometry(probe, config_of(options))
    attach(optimizer, geometry, on_refresh_error)
    optimizer.restore = partial(restore, optimizer, geometry)  # type: ignore[attr-defined]
    return optimizer


def config_of(options: Mapping[str, Any]) -> SafetyConfig:
    """The configuration that a caller's options make.

    Raises:
        TypeError: if one is unknown.
        ValueError: if one is out of its range.
    """
    unknown = sorted(set(options) - set(SafetyConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(SafetyConfig.__dataclass_fields__)
        raise TypeError(f"options: {', '.join(unknown)} is unknown; expected some of: {known}")
    return SafetyConfig(**options)
