"""A refresh happens as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from safeopt.distributed import local, master_of
from safeopt.optim.copies import copied, put_back

if TYPE_CHECKING:
    from safeopt.optim.geometry import SafetyGeometry


@contextmanager
def whole_or_not_at_all(
    geometry: SafetyGeometry, params: Sequence[Tensor]
) -> Iterator[Callable[[], None]]:
    """Where the block raises, parameters and geometry are as before, bit for bit.

    Out of memory and Ctrl-C included. Safety passes that were made stay counted: they have cost
    what they cost.

    Yields:
        What the block must call before it moves the parameters; of several calls the first counts.
        It copies them (`safeopt.optim.copies`). So the copy does not lie beside a first refresh's
        per-example gradients, where memory peaks. With masters (DeepSpeed's ZeRO) it also copies
        the model's whole weights: to publish the masters takes all ranks, and an error of one rank
        alone would wait for the others instead of ending the run.
    """
    kept: list[Tensor] = []
    subspace, rota = geometry.subspace, geometry.rota
    own, history = dict(vars(geometry)), list(geometry.history)
    fields = None if subspace is None else dict(vars(subspace))
    turns = dict(vars(rota))

    def before_move() -> None:
        if not kept:
            kept.extend(copied(_written(params)))

    try:
        yield before_move
    except BaseException:
        if kept:
            put_back(_written(params), kept)
        vars(geometry).update(own)
        geometry.history[:] = history
        vars(rota).update(turns)
        if fields is not None:
            vars(subspace).update(fields)
        raise


def _written(params: Sequence[Tensor]) -> Iterator[Tensor]:
    """All that this process holds of the parameters and that a move writes to."""
    yield from map(local, params)
    yield from (p for p in params if master_of(p) is not None)
