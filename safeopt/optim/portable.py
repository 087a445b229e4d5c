"""A protected optimizer's state in the form that ``torch.distributed.checkpoint`` carries.

Its ``get_optimizer_state_dict`` keeps what belongs to a parameter, by the parameter's name, and to
a group, and drops all other entries; its ``load`` fills entries that are there already, of the same
shape. So wherever there is a process group, the geometry's state travels as

- ``state[p]["safety_basis"]``: U, ``(K, *p.shape)``, sharded as p is. K is the largest rank
  possible; unused directions are zero. The run that loads it must have the same K;
- ``state[p]["safety_pull"]``, where there is a pull to the aligned model: its block, likewise;
- ``param_groups[0]["safeopt.safety"]``: all else, as JSON: its numbers are exact.

Such a state can be loaded in any layout: on another number of ranks, with whole or sharded
parameters, and without a process group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from safeopt.distributed import Layout, is_sharded, local
from safeopt.optim.state import in_saved_order, saved_eigenvalues

_BASIS, _PULL = "safety_basis", "safety_pull"
_PREFIX = "safeopt."


def in_process_group() -> bool:
    """Whether torch.distributed is in use."""
    return dist.is_available() and dist.is_initialized()


def hide(state: dict[str, Any], name: str) -> None:
    """Move an entry of a state, of numbers, texts and small tensors, into its first group."""
    text = json.dumps(state.pop(name), default=_encoded)
    state["param_groups"][0][_PREFIX + name] = text


def hide_basis(
    state: dict[str, Any],
    optimizer: Optimizer,
    params: Sequence[Tensor],
    blocks: Sequence[Tensor],
    rank: int,
) -> None:
    """Put a dense basis among the parameters' own entries.

    Args:
        state: the optimizer's state.
        optimizer: whose state it is.
        params: the protected parameters.
        blocks: this process's part of U for each of them, shape ``(k, *part)``.
        rank: K; a larger basis is kept whole.
    """
    # A basis that was loaded may have more directions, until the next refresh.
    padded = [
        torch.cat([block, block.new_zeros((max(0, rank - len(block)), *block.shape[1:]))])
        for block in blocks
    ]
    _hide_blocks(state, optimizer, params, _BASIS, padded)


def hide_pull(
    state: dict[str, Any], optimizer: Optimizer, params: Sequence[Tensor], blocks: Sequence[Tensor]
) -> None:
    """Put the blocks of a pull, shape ``(3, *part)``, among the parameters' own entries."""
    _hide_blocks(state, optimizer, params, _PULL, blocks)


def _hide_blocks(
    state: dict[str, Any],
    optimizer: Optimizer,
    params: Sequence[Tensor],
    name: str,
    blocks: Sequence[Tensor],
) -> None:
    keys = _keys(state, optimizer)
    for p, block in zip(params, blocks, strict=True):
        # A new entry: the one that is there is the optimizer's own, which must not keep the block.
        own = state["state"].get(keys[id(p)], {})
        state["state"][keys[id(p)]] = {**own, name: _spread(block, p)}


def reveal(
    state: dict[str, Any], optimizer: Optimizer, params: Sequence[Tensor], model: nn.Module
) -> dict[str, Any]:
    """The state with its hidden entries back in their places; itself if it has none.

    Args:
        state: not changed.
        optimizer: into which it is loaded.
        params: its protected parameters.
        model: the probe's.

    Raises:
        ValueError: if an entry cannot be read, or the basis of a parameter is missing.
    """
    hidden = _hidden(state)
    if not hidden:
        return state
    entries = {name.removeprefix(_PREFIX): _decoded(name, text) for name, text in hidden.items()}
    eigenvalues = saved_eigenvalues(entries.get("safety"))
    if eigenvalues is not None:
        safety = entries["safety"]
        params = in_saved_order(params, safety, model)
        basis = _parts(state, optimizer, params, _BASIS)
        if any(part is None for part in basis):
            raise ValueError(
                f"state_dict: {sum(part is None for part in basis)} of {len(params)} protected "
                f'parameters have no "{_BASIS}" entry; it was saved with other parameters'
            )
        blocks = [part[: eigenvalues.numel()] for part in basis if part is not None]
        safety["subspace"]["basis"] = {"kind": "dense", "blocks": blocks}
        pull = _parts(state, optimizer, params, _PULL)
        if isinstance(safety.get("pull"), dict) and all(part is not None for part in pull):
            safety["pull"]["blocks"] = pull
        else:  # one that is not wanted is not read by DCP
            safety["pull"] = None
    return {**stripped(state), **entries}


def _parts(
    state: Mapping[str, Any], optimizer: Optimizer, params: Sequence[Tensor], name: str
) -> list[Tensor | None]:
    """This process's part of the entries that `_hide_blocks` made; None where there is none."""
    keys = _keys(state, optimizer)
    found = [state["state"].get(keys.get(id(p)), {}).get(name) for p in params]
    return [
        None if block is None else _part(block, p) for block, p in zip(found, params, strict=True)
    ]


def stripped(state: dict[str, Any]) -> dict[str, Any]:
    """The state without its hidden entries; itself if it has none."""
    hidden = _hidden(state)
    if not hidden:
        return state
    own = {
        key: {name: value for name, value in entry.items() if name not in (_BASIS, _PULL)}
        for key, entry in state["state"].items()
    }
    return {
        **state,
        "state": {key: entry for key, entry in own.items() if entry},
        "param_groups": [
            {name: value for name, value in group.items() if name not in hidden}
            for group in state["param_groups"]
        ],
    }


def _hidden(state: Mapping[str, Any]) -> dict[str, str]:
    """The texts of `hide`, in whichever group: torch puts groups into the optimizer's order."""
    groups = state.get("param_groups", [])
    entries = (entry for group in groups for entry in group.items())
    return {name: text for name, text in entries if name.startswith(_PREFIX)}


def _keys(state: Mapping[str, Any], optimizer: Optimizer) -> dict[int, Any]:
    """The names of parameters in a state: numbers, or the model's names for them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): name for p, name in zip(params, names, strict=False)}


def _spread(block: Tensor, p: Any) -> Tensor:
    """This process's part ``(K, *part)`` as a tensor sharded like the parameter."""
    if not is_sharded(p):
        return block
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [
        Shard(placement.dim + 1) if placement.is_shard() else Replicate()
        for placement in p.placements
    ]
    shape = torch.Size((len(block), *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        block, p.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _part(block: Any, p: Tensor) -> Tensor:
    """What of a saved block belongs to this process's part of a parameter."""
    if is_sharded(p):
        part = Layout.of([p]).parts[0]
        return local(block) if is_sharded(block) or part is None else part.cut(block, leading=1)
    return block.full_tensor() if is_sharded(block) else block


def _encoded(value: Tensor) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}


def _decoded(name: str, text: str) -> Any:
    def tensor(entry: dict[str, Any]) -> Any:
        if set(entry) != {"dtype", "shape", "values"}:
            return entry
        values = torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]), device="cpu")
        return values.reshape(entry["shape"])

    try:
        return json.loads(text, object_hook=tensor)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f'state_dict["param_groups"]: "{name}" cannot be read ({error})'
        ) from error
