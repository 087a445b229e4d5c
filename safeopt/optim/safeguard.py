"""`safeguard`: the same protection around an optimizer that the user already has."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.optim import Optimizer

from safeopt.optim.config import SafetyConfig
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.protection import attach, restore
from safeopt.probe import SafetyProbe


def safeguard(optimizer: Optimizer, probe: SafetyProbe, **options: Any) -> Optimizer:
    """Protect the parameters of any torch optimizer.

    Args:
        optimizer: an optimizer that has taken no step yet; it is changed, not wrapped.
        probe: the safety examples; its model holds the optimizer's parameters.
        **options: fields of `SafetyConfig`: ``rank``, ``mode``, ``damping``, ``budget``, ….

    Returns:
        ``optimizer`` itself, now with the attribute ``safety`` (its `SafetyGeometry`) and the
        method ``restore()``, see `ProjectedAdamW.restore`.

    Raises:
        TypeError: if ``optimizer`` is not a torch optimizer, or an option is unknown.
        ValueError: if an option is out of its range or the optimizer is protected already.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer")
    if hasattr(optimizer, "safety"):
        raise ValueError("optimizer: it is protected already; call safeguard once")
    unknown = sorted(set(options) - set(SafetyConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(SafetyConfig.__dataclass_fields__)
        raise TypeError(f"options: {', '.join(unknown)} is unknown; expected some of: {known}")
    geometry = SafetyGeometry(probe, SafetyConfig(**options))
    attach(optimizer, geometry)
    optimizer.safety = geometry  # type: ignore[attr-defined]
    optimizer.restore = partial(restore, optimizer, geometry)  # type: ignore[attr-defined]
    return optimizer
