"""Which layers carry the safety curvature, and where the task pushes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from safeopt.diagnostics.measure import Evidence
from safeopt.diagnostics.spectrum import Spectrum

# What PEFT puts around the names of a model's own modules; an adapter's name follows its factor's.
_WRAPPING = re.compile(
    r"^base_model\.model\.|\.(?:lora_[A-Za-z_]+|modules_to_save)(?:\.[^.]+)?"
    r"|\.(?:default|base_layer|weight|bias)\b"
)
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class LayerShare:
    """One module's part in the safety curvature and in the task's gradient.

    Attributes:
        name: of the module, without what PEFT puts around it.
        block: number of the transformer block it stands in; None outside of all.
        kind: its name within the block, such as ``self_attn.q_proj``.
        parameters: number of trained entries.
        curvature: share of Tr F; the shares of all modules sum to 1.
        subspace: the part of that share in the top k directions, Σ_j λ_j‖u_j‖² over Tr F with u_j
            restricted to the module.
        gradient: share of ‖g‖².
    """

    name: str
    block: int | None
    kind: str
    parameters: int
    curvature: float
    subspace: float
    gradient: float


def layer_shares(evidence: Evidence, rank: int) -> list[LayerShare]:
    """The modules' shares, in the order of the parameters; no pass through the model."""
    spectrum = Spectrum.of(evidence.gram)
    top = spectrum.vectors[:, : spectrum.rank(rank)]
    examples = len(top)
    traces = evidence.grams.diagonal(dim1=1, dim2=2).sum(1) / examples
    inside = (top * (evidence.grams @ top)).sum(dim=(1, 2)) / examples
    total, energy = spectrum.trace, float(evidence.gradient_energy.sum())
    members: dict[str, list[int]] = {}
    for index, name in enumerate(evidence.names):
        members.setdefault(module_name(name), []).append(index)
    shares = []
    for name, indices in members.items():
        block, kind = place(name)
        shares.append(
            LayerShare(
                name=name,
                block=block,
                kind=kind,
                parameters=sum(evidence.sizes[i] for i in indices),
                curvature=float(traces[indices].sum()) / total if total > 0 else 0.0,
                subspace=float(inside[indices].sum()) / total if total > 0 else 0.0,
                gradient=float(evidence.gradient_energy[indices].sum()) / energy
                if energy > 0
                else 0.0,
            )
        )
    return shares


def block_shares(shares: list[LayerShare]) -> Mapping[int, float]:
    """The share of Tr F in each transformer block, over its modules, in the blocks' order."""
    sums: dict[int, float] = {}
    for share in shares:
        if share.block is not None:
            sums[share.block] = sums.get(share.block, 0.0) + share.curvature
    return dict(sorted(sums.items()))


def module_name(parameter: str) -> str:
    """The module of a parameter as the model calls it.

    >>> module_name("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight")
    'model.layers.3.self_attn.q_proj'
    """
    return _WRAPPING.sub("", parameter) or parameter


def place(name: str) -> tuple[int | None, str]:
    """Number of the transformer block in which a module stands, and its name there."""
    found = _BLOCK.search(name)
    return (int(found[1]), found[2]) if found else (None, name)
