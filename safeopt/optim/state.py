"""What of a `SafetyGeometry` goes into a checkpoint: plain tensors and numbers only.

The state loads with ``torch.load(weights_only=True)``. The basis keeps its own dtype: it bypasses
torch's habit of casting optimizer state to the parameter's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.subspace import SafetySubspace
from safeopt.curvature.surrogate import Surrogate

if TYPE_CHECKING:
    from safeopt.optim.geometry import SafetyGeometry

VERSION = 1
_VECTORS = (
    "eigenvalues",
    "coefficients",
    "losses",
    "targets",
    "anchor",
    "gradient",
    "position",
    "taken_back",
)


def pack_state(geometry: SafetyGeometry) -> dict[str, Any]:
    """Return the geometry's state as a dict of tensors, numbers, lists and None."""
    subspace = geometry.subspace
    state: dict[str, Any] = {
        "version": VERSION,
        **geometry.counters(),
        "passes": geometry.passes.as_dict(),
        "history": [list(asdict(entry).values()) for entry in geometry.history],
        "subspace": None,
    }
    if subspace is not None:
        state["subspace"] = {
            "basis": [block.clone() for block in subspace.basis.blocks],
            "eigenvalues": subspace.eigenvalues.clone(),
            "coefficients": subspace.coefficients.clone(),
            "losses": subspace.losses.clone(),
            "targets": subspace.targets.clone(),
            "anchor": subspace.anchor.clone(),
            "value": subspace.surrogate.value,
            "gradient": subspace.surrogate.gradient.clone(),
            "scale": subspace.surrogate.scale,
            **{name: _copy(value) for name, value in geometry.vectors().items()},
        }
    return state


def check_state(state: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Refuse a state that is truncated, tampered with or of another model.

    Raises:
        ValueError: naming the entry that does not fit.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f'state_dict["safety"]: version {found}; this safeopt reads {VERSION}')
    missing = {
        "step_count",
        "last_refresh",
        "drawn",
        "held_drawn",
        "reference",
        "coupling",
        "history",
        "passes",
        "subspace",
    } - set(state)
    if missing:
        raise ValueError(f'state_dict["safety"]: {", ".join(sorted(missing))} is missing')
    subspace = state["subspace"]
    if subspace is None:
        return
    absent = {*_VECTORS, "basis", "value", "scale", "first_drift", "last_gradient"} - set(subspace)
    if absent:
        raise ValueError(
            f'state_dict["safety"]["subspace"]: {", ".join(sorted(absent))} is missing'
        )
    rank = len(subspace["eigenvalues"])
    shapes = [tuple(block.shape) for block in subspace["basis"]]
    expected = [(rank, *p.shape) for p in params]
    if shapes != expected:
        raise ValueError(
            'state_dict["safety"]["subspace"]["basis"]: its shapes do not fit the parameters '
            f"({len(shapes)} blocks of rank {rank} for {len(expected)} parameters)"
        )
    finite = [subspace["basis"], [subspace[n] for n in _VECTORS if n != "targets"]]
    if not all(bool(torch.isfinite(x).all()) for part in finite for x in part):
        raise ValueError('state_dict["safety"]["subspace"]: it holds a value that is not finite')
    if not math.isfinite(subspace["value"]) or not subspace["scale"] > 0:
        raise ValueError('state_dict["safety"]["subspace"]: value or scale is out of range')


def load_state(
    geometry: SafetyGeometry, state: Mapping[str, Any], params: Sequence[Tensor]
) -> None:
    """Put a checked state into ``geometry``, on the parameters' devices."""
    stored = state["subspace"]
    subspace, vectors = None, {}
    if stored is not None:
        small = {name: stored[name].to(params[0].device).clone() for name in _VECTORS}
        subspace = SafetySubspace(
            DenseBasis(
                [x.to(p.device).clone() for x, p in zip(stored["basis"], params, strict=True)]
            ),
            small["eigenvalues"],
            small["coefficients"],
            small["losses"],
            small["targets"],
            small["anchor"],
            Surrogate(stored["value"], small["gradient"], small["eigenvalues"], stored["scale"]),
        )
        vectors = {
            "position": small["position"],
            "taken_back": small["taken_back"],
            "first_drift": _copy(stored["first_drift"]),
            "last_gradient": _copy(stored["last_gradient"]),
        }
    for name, value in state["passes"].items():
        setattr(geometry.passes, name, value)
    geometry.resume(state, subspace, vectors)


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
