"""The kinds of storage of a basis by name, and the rule that picks one.

| kind | bytes | exact |
|---|---|---|
| `dense` | 4·k for each parameter (8·k in float64) | yes |
| `int8` | 1.06·k for each parameter | to about 1% of each direction |
| `factored` | 4·T(d_in + d_out) a layer for T tokens, whatever k | yes |
| `compressed` | 1 to 2% of `dense` at 135M parameters, 0.1% at 7B | a stated share of the energy |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from safeopt.curvature.bases.compressed import CompressedBasis
from safeopt.curvature.bases.factored import FactoredBasis
from safeopt.curvature.bases.int8 import Int8Basis
from safeopt.curvature.basis import Basis, DenseBasis
from safeopt.distributed import ALONE, Layout
from safeopt.rows import row_dtype

logger = logging.getLogger("safeopt")

Storage = Literal["dense", "int8", "factored", "compressed", "auto"]
BASES: dict[str, Any] = {
    cls.kind: cls for cls in (DenseBasis, Int8Basis, FactoredBasis, CompressedBasis)
}
# A basis of this size is never worth a compromise.
_ALWAYS_FITS = 256 * 2**20
# The share of the model's bytes that an exact basis may take.
_SHARE = 0.5


def choose_basis(
    storage: str,
    params: Sequence[Tensor],
    rank: int,
    model: nn.Module,
    layout: Layout = ALONE,
) -> str:
    """The kind of basis that ``storage`` names; "auto" picks by bytes and says so in the log.

    The first of `dense`, `int8` that takes at most half of the bytes of the model's parameters, or
    256 MiB, and else `compressed`. `factored` is taken only by name: its work at each step grows
    with the tokens of the window.

    Args:
        storage: one of `Storage`.
        params: the protected parameters.
        rank: the largest number of directions.
        model: the model, frozen parameters included.
        layout: how the parameters lie over the processes; sharded ones have `dense` bases.

    Raises:
        ValueError: if there is no such kind, or not for sharded parameters.
    """
    if storage not in get_args(Storage):
        listed = ", ".join(f'"{name}"' for name in get_args(Storage))
        raise ValueError(f'basis="{storage}": expected one of {listed}')
    if layout.sharded:
        if storage not in ("auto", DenseBasis.kind):
            raise ValueError(
                f'basis="{storage}": sharded parameters (fully_shard) need basis="dense", of which '
                "each rank keeps its part; choose a smaller rank if that does not fit"
            )
        return DenseBasis.kind
    if storage != "auto":
        return storage
    limit = max(_ALWAYS_FITS, _SHARE * sum(p.nbytes for p in model.parameters()))
    sizes = {
        "dense": sum(rank * p.numel() * row_dtype(p).itemsize for p in params),
        "int8": sum(rank * p.numel() * 17 // 16 for p in params),
    }
    kind = next((name for name, size in sizes.items() if size <= limit), "compressed")
    logger.info(
        'basis="auto": %s (dense %.0f MB, int8 %.0f MB, limit %.0f MB)',
        kind,
        sizes["dense"] / 1e6,
        sizes["int8"] / 1e6,
        limit / 1e6,
    )
    return kind


def empty_basis(kind: str, params: Sequence[Tensor], layout: Layout = ALONE) -> Basis:
    """A basis of a kind without a direction yet."""
    basis: Basis = BASES[kind].empty(params, **_placed(kind, layout))
    return basis


def basis_from_state(
    state: Mapping[str, Any], params: Sequence[Tensor], layout: Layout = ALONE
) -> Basis:
    """The basis of a `Basis.state_dict`, on the parameters' devices; `dense` alone copies them.

    Raises:
        ValueError: if the state is no basis, or does not fit the parameters.
    """
    kind = state.get("kind") if isinstance(state, Mapping) else None
    if not (isinstance(kind, str) and kind in BASES):
        raise ValueError(f"it is no basis of a known kind ({', '.join(BASES)})")
    try:
        basis: Basis = BASES[kind].from_state(state, params, **_placed(kind, layout))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its entries do not fit the parameters ({error!r})") from error
    return basis


def _placed(kind: str, layout: Layout) -> dict[str, Layout]:
    """The layout for those bases that have one; others are computed whole by every process."""
    return {"layout": layout} if kind == DenseBasis.kind else {}
