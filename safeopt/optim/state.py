"""What of a `SafetyGeometry` goes into a checkpoint: plain tensors and numbers only.

The state loads with ``torch.load(weights_only=True)``. The basis keeps its own dtype: it bypasses
torch's habit of casting optimizer state to the parameter's dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from safeopt.curvature.bases import basis_from_state
from safeopt.curvature.subspace import SafetySubspace
from safeopt.curvature.surrogate import Surrogate
from safeopt.curvature.window import Window
from safeopt.distributed import local, reshard
from safeopt.optim.elastic import ElasticPull
from safeopt.optim.estimate import pulls, warn_without_pull
from safeopt.passes import PassCounter
from safeopt.rows import row_dtype

if TYPE_CHECKING:
    from safeopt.optim.geometry import SafetyGeometry

VERSION = 9  # since the pull to the aligned model knows the task's curvature
_WHERE = 'state_dict["safety"]'
_COUNTS = ("step_count", "last_refresh", "held_count", "drawn", "held_drawn", "checked")
_OTHERS = ("opening", "trial", "history", "passes", "kl_reference", "pull", "subspace")
_REFERENCES = ("reference", "reference_odds", "trial_reference")  # known once there is a subspace
_NUMBERS = (*_REFERENCES, "coupling", "last_rate", "travelled")
# The tensors of a subspace by their shapes: k directions, w examples in the window, h held ones.
_SHAPES = {
    "eigenvalues": "k",
    "coefficients": "wk",
    "losses": "w",
    "tokens": "w",
    "targets": "w",
    "anchor": "k",
    "gradient": "k",
    "position": "k",
    "taken_back": "k",
    "held_targets": "h",
}
_WINDOW = ("coefficients", "losses", "tokens", "targets")
_OPTIONAL = ("first_drift", "last_gradient")  # k numbers, or None


def pack_state(geometry: SafetyGeometry) -> dict[str, Any]:
    """Return the geometry's state as a dict of tensors, numbers, lists and None."""
    subspace = geometry.subspace
    state: dict[str, Any] = {
        "version": VERSION,
        **geometry.counters(),
        "held_count": geometry.probe.held_count,
        "opening": geometry.probe.opening,
        "trial": list(geometry.rota.trial),
        "passes": geometry.passes.as_dict(),
        "history": [list(asdict(entry).values()) for entry in geometry.history],
        "kl_reference": geometry.probe.reference(),
        "pull": None,
        "subspace": None,
    }
    if geometry.pull is not None:
        state["pull"] = {"trace": geometry.pull.trace, "blocks": _copies(geometry.pull.blocks)}
    if subspace is not None:
        state["subspace"] = {
            "names": _names(geometry.spanned, geometry.probe.model),
            "basis": _copies(subspace.basis.state_dict()),
            "eigenvalues": subspace.eigenvalues.clone(),
            **{name: getattr(subspace.window, name).clone() for name in _WINDOW},
            "anchor": subspace.anchor.clone(),
            "value": subspace.surrogate.value,
            "gradient": subspace.surrogate.gradient.clone(),
            **{name: _copy(value) for name, value in geometry.vectors().items()},
        }
    return state


def check_state(
    state: Mapping[str, Any], params: Sequence[Tensor], geometry: SafetyGeometry
) -> None:
    """Refuse a state that is truncated, tampered with, of another model or of another probe.

    Args:
        state: what `pack_state` returned, before it was saved.
        params: the protected parameters, `in_saved_order` where the caller can have them so.
        geometry: what it is to be loaded into.

    Raises:
        ValueError: naming the entry that does not fit.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if not (isinstance(version, int) and version == VERSION):
        found = version if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{_WHERE}: version {found}; this safeopt reads {VERSION}")
    missing = {*_COUNTS, *_NUMBERS, *_OTHERS} - set(state)
    if missing:
        raise ValueError(f"{_WHERE}: {', '.join(sorted(missing))} is missing")
    for name in _COUNTS:
        if not (isinstance(state[name], int) and _is_number(state[name]) and state[name] >= 0):
            raise ValueError(f"{_WHERE}: {name}={state[name]!r}; expected a count")
    for name in ("last_refresh", "checked"):
        if state[name] > state["step_count"]:
            raise ValueError(
                f"{_WHERE}: {name}={state[name]}; expected at most step_count={state['step_count']}"
            )
    for name in _NUMBERS:
        if not (state[name] is None or _is_number(state[name])):
            raise ValueError(f"{_WHERE}: {name}={state[name]!r}; expected a finite number or None")
    if state["travelled"] is None or state["travelled"] < 0:
        raise ValueError(
            f"{_WHERE}: travelled={state['travelled']!r}; expected a number of at least 0, the sum "
            "of the learning rates so far"
        )
    history, passes = state["history"], state["passes"]
    if not (isinstance(history, list) and all(_is_entry(entry) for entry in history)):
        raise ValueError(f'{_WHERE}["history"]: expected a list with the numbers of Measurements')
    if not (isinstance(passes, Mapping) and set(passes) == set(PassCounter().as_dict())):
        raise ValueError(f'{_WHERE}["passes"]: its entries are not those of PassCounter')
    if not all(_is_number(count) for count in passes.values()):
        raise ValueError(f'{_WHERE}["passes"]: expected finite numbers')
    probe = geometry.probe
    if state["subspace"] is not None:
        for name in _REFERENCES:
            if state[name] is None:
                raise ValueError(
                    f"{_WHERE}: {name}=None beside a subspace; expected the aligned model's, a "
                    "finite number"
                )
        if not history:
            raise ValueError(f'{_WHERE}["history"]: empty beside a subspace; expected a first look')
        try:
            probe.check_reference(state["kl_reference"])
        except ValueError as error:
            raise ValueError(f'{_WHERE}["kl_reference"]: {error}') from error
        _check_subspace(state["subspace"], params)
        if pulls(geometry.config, state["subspace"]["basis"]["kind"]):
            _check_pull(state["pull"], params)
        _check_order(state["subspace"]["names"], _names(params, probe.model))
        if state["held_count"] != probe.held_count:
            raise ValueError(
                f"{_WHERE}: it was saved with {state['held_count']} held examples, the probe now "
                f"has {probe.held_count}; build the probe with the examples of the saved run"
            )
        if state["opening"] != probe.opening:
            raise ValueError(
                f"{_WHERE}: it was saved with opening={state['opening']}, the probe now has "
                f"opening={probe.opening}; build the probe as in the saved run"
            )
        # Their loss is compared with the saved one. As text, which compares with anything.
        if str(state["trial"]) != str(geometry.rota.trial):
            raise ValueError(
                f"{_WHERE}: it was saved with the trial examples {state['trial']}, now they are "
                f"{geometry.rota.trial}; build the probe with the examples of the saved run, and "
                "the optimizer with its trial_examples and seed"
            )
        if len(state["subspace"]["held_targets"]) != len(geometry.rota.held):
            raise ValueError(
                f'{_WHERE}["subspace"]["held_targets"]: '
                f"{len(state['subspace']['held_targets'])} targets, expected "
                f"{len(geometry.rota.held)}"
            )


def _check_subspace(subspace: Any, params: Sequence[Tensor]) -> None:
    where = f'{_WHERE}["subspace"]'
    if not isinstance(subspace, Mapping):
        raise ValueError(f"{where}: {type(subspace).__name__}; expected a dict")
    absent = {*_SHAPES, *_OPTIONAL, "names", "basis", "value"} - set(subspace)
    if absent:
        raise ValueError(f"{where}: {', '.join(sorted(absent))} is missing")
    present = [*_SHAPES, *(name for name in _OPTIONAL if subspace[name] is not None)]
    for name in present:
        vector = subspace[name]
        if not (_is_dense(vector) and vector.dtype == torch.float64):
            raise ValueError(f'{where}["{name}"]: {_kind(vector)}; expected a dense float64 tensor')
    sizes = {
        "k": subspace["eigenvalues"].numel(),
        "w": subspace["losses"].numel(),
        "h": subspace["held_targets"].numel(),
    }
    for name in present:
        expected = tuple(sizes[letter] for letter in _SHAPES.get(name, "k"))
        if tuple(subspace[name].shape) != expected:
            raise ValueError(
                f'{where}["{name}"]: shape {tuple(subspace[name].shape)}, expected {expected}'
            )
    if not all(map(_is_dense, _tensors(subspace["basis"]))):
        raise ValueError(f'{where}["basis"]: expected dense tensors')
    try:
        basis = basis_from_state(subspace["basis"], params)
    except ValueError as error:
        raise ValueError(f'{where}["basis"]: {error}') from error
    if basis.rank != sizes["k"]:
        raise ValueError(
            f'{where}["basis"]: its shapes do not fit the parameters ({basis.rank} directions, '
            f"{sizes['k']} eigenvalues)"
        )
    vectors = {name: [subspace[name]] for name in present if name != "targets"}
    for name, tensors in {"basis": _tensors(subspace["basis"]), **vectors}.items():
        if not all(bool(torch.isfinite(x).all()) for x in tensors):
            raise ValueError(f'{where}["{name}"]: it holds a value that is not finite')
    for name in ("eigenvalues", "tokens"):
        if bool((subspace[name] < 0).any()):
            raise ValueError(f'{where}["{name}"]: it holds a negative value')
    if not _is_number(subspace["value"]):
        raise ValueError(f"{where}: value={subspace['value']!r}; expected a finite number")


def _check_pull(pull: Any, params: Sequence[Tensor]) -> None:
    where = f'{_WHERE}["pull"]'
    if pull is None:
        raise ValueError(
            f"{where}: it was saved without a pull, and the aligned parameters to which elastic "
            "would pull are not known any more; build the optimizer with elastic=0"
        )
    if not (isinstance(pull, Mapping) and {"trace", "blocks"} <= set(pull)):
        raise ValueError(f"{where}: expected its trace and blocks")
    if not (_is_number(pull["trace"]) and pull["trace"] >= 0):
        raise ValueError(f"{where}: trace={pull['trace']!r}; expected a number of at least 0")
    shapes = [(3, *local(p).shape) for p in params]
    blocks = _tensors(pull["blocks"])
    if not all(map(_is_dense, blocks)):
        raise ValueError(f"{where}: expected dense tensors")
    if [tuple(block.shape) for block in blocks] != shapes:
        raise ValueError(f"{where}: the shapes of its blocks do not fit the parameters")
    for block in blocks:
        if not (bool(torch.isfinite(block).all()) and bool((block[1:] >= 0).all())):
            raise ValueError(f"{where}: it holds a value that is not finite, or a negative square")


def _check_order(saved: Any, names: Sequence[str]) -> None:
    where = f'{_WHERE}["subspace"]["names"]'
    if not _are_names(saved):
        raise ValueError(f"{where}: expected the names of {len(names)} parameters")
    if len(saved) != len(names):
        raise ValueError(f"{where}: {len(saved)} names for {len(names)} parameters")
    if sorted(saved) == sorted(names) and saved != names:
        place = next(i for i, (old, new) in enumerate(zip(saved, names, strict=True)) if old != new)
        raise ValueError(
            f"{where}: parameter {place} was {saved[place]} and is now {names[place]}; give the "
            "optimizer its parameters in the order of the saved run"
        )


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose numbers can be read one by one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _kind(value: Any) -> str:
    """What it is, for an error's message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype}, {'meta' if value.is_meta else value.layout}"


def _is_entry(entry: Any) -> bool:
    """Whether a history entry has the numbers of a `Measurement`."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    step, loss, predicted, restored, examples = entry
    optional = [x for x in (predicted, restored) if x is not None]
    return all(map(_is_number, (step, loss, *optional, examples)))


def saved_eigenvalues(state: Any) -> Tensor | None:
    """The eigenvalues in a state that may not have been checked; None where it has none."""
    subspace = state.get("subspace") if isinstance(state, Mapping) else None
    eigenvalues = subspace.get("eigenvalues") if isinstance(subspace, Mapping) else None
    return eigenvalues if isinstance(eigenvalues, Tensor) else None


def in_saved_order(params: Sequence[Tensor], state: Any, model: nn.Module) -> list[Tensor]:
    """The parameters in the order of a state's basis, which may not have been checked.

    An optimizer's groups may be in another order than when the subspace was first estimated, and
    parameters of one shape look alike.

    Args:
        params: the protected parameters.
        state: what `pack_state` returned.
        model: the probe's.

    Returns:
        The order as given where the model names them otherwise than the saved one did, as it does
        once it is compiled.
    """
    subspace = state.get("subspace") if isinstance(state, Mapping) else None
    saved = subspace.get("names") if isinstance(subspace, Mapping) else None
    if not _are_names(saved):
        return list(params)
    named = dict(zip(_names(params, model), params, strict=True))
    known = len(named) == len(params) and sorted(named) == sorted(saved)
    return [named[name] for name in saved] if known else list(params)


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _names(params: Sequence[Tensor], model: nn.Module) -> list[str]:
    """What the model calls its parameters; "" for those of another one."""
    reshard(model)  # whole weights are other objects
    names = {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p), "") for p in params]


def load_state(
    geometry: SafetyGeometry, state: Mapping[str, Any], params: Sequence[Tensor]
) -> None:
    """Put a state that was checked with ``params`` into ``geometry``, on their devices."""
    stored = state["subspace"]
    subspace, vectors = None, {}
    if stored is not None:
        device = params[0].device
        small = {name: stored[name].to(device).clone() for name in _SHAPES}
        subspace = SafetySubspace(
            basis_from_state(_copies(stored["basis"]), params, geometry.probe.layout(params)),
            small["eigenvalues"],
            Window(*(small[name] for name in _WINDOW)),
            small["anchor"],
            Surrogate(stored["value"], small["gradient"], small["eigenvalues"]),
        )
        vectors = {
            "position": small["position"],
            "taken_back": small["taken_back"],
            "held_targets": _copy(stored["held_targets"], torch.device("cpu")),
            **{name: _copy(stored[name], device) for name in _OPTIONAL},
        }
        geometry.probe.restore_reference(state["kl_reference"])
        if geometry.subspace is None:  # else its own first estimate has told
            warn_without_pull(geometry.config, subspace.basis.kind)
    for name, value in state["passes"].items():
        setattr(geometry.passes, name, value)
    geometry.resume(state, subspace, vectors)
    geometry.span(params if subspace is not None else [])
    geometry.pull = None
    if subspace is not None and pulls(geometry.config, subspace.basis.kind):
        blocks = [
            block.detach().to(p.device, row_dtype(p), copy=True)
            for block, p in zip(state["pull"]["blocks"], params, strict=True)
        ]
        geometry.pull = ElasticPull(blocks, state["pull"]["trace"])


def _copy(value: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    return None if value is None else value.detach().clone().to(device)


def _copies(tree: Any) -> Any:
    """Nested dicts and lists with their tensors copied."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
