"""Top eigenpairs by our solvers and by the peers, on one matrix, with one referee."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Literal

import psutil
import torch
from torch import nn

from benchmarks.curvature.peers import Operator, Peer, Problem, Solved, Solver, run_peer
from benchmarks.curvature.records import EigenpairsRow
from benchmarks.curvature.timing import Stopwatch
from benchmarks.environment import PeakMemory
from safeopt.curvature.krylov import Eigenpairs, lanczos
from safeopt.curvature.operators import GGNOperator, HessianOperator
from safeopt.curvature.tracking import drift

LOSS: Final = "causal_lm"
OURS = "safeopt"


class Calls:
    """Counts a model's forward calls while the block runs; what runs inside counts alike for all.

    Args:
        model: the module.
        listener: told the number after each call.
    """

    def __init__(self, model: nn.Module, listener: Callable[[int], None]) -> None:
        self.count = 0
        self._model = model
        self._listener = listener

    def __enter__(self) -> Calls:
        self._handle = self._model.register_forward_hook(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _called(self, *arguments: Any) -> None:
        self.count += 1
        self._listener(self.count)


def operator_of(problem: Problem, kind: Operator) -> HessianOperator | GGNOperator:
    """Our operator for a problem."""
    build = HessianOperator if kind == "hessian" else GGNOperator
    return build(problem.model, [problem.batch], LOSS, params=problem.params)


def ours(problem: Problem, kind: Operator) -> Solved:
    """Lanczos from a random vector."""
    return solved(lanczos(operator_of(problem, kind), problem.rank, tolerance=problem.tolerance))


class WarmStart:
    """Lanczos from the eigenvectors of an earlier point, which are computed here, untimed.

    Args:
        problem: at the earlier point.
        kind: the operator.
    """

    def __init__(self, problem: Problem, kind: Operator) -> None:
        self._earlier = lanczos(
            operator_of(problem, kind), problem.rank, tolerance=problem.tolerance
        )

    def __call__(self, problem: Problem, kind: Operator) -> Solved:
        """Solve at the present point."""
        operator = operator_of(problem, kind)
        found = lanczos(
            operator, problem.rank, tolerance=problem.tolerance, start=self._earlier.basis
        )
        cosines = torch.linalg.svdvals(self._earlier.basis.inner(found.basis))
        notes = {"cosines_with_the_earlier_space": [float(x) for x in cosines]}
        return replace(solved(found), notes=notes)

    def drift(self, problem: Problem, kind: Operator) -> float:
        """What the test of the earlier space says at the present point."""
        return drift(operator_of(problem, kind), self._earlier)


def theirs(peer: Peer) -> Solver:
    """A peer's solver."""
    return lambda problem, kind: run_peer(peer, problem, kind)


def solved(pairs: Eigenpairs) -> Solved:
    """Our eigenpairs in the form of the peers'."""
    rows = torch.cat([block.flatten(1) for block in pairs.basis.blocks], dim=1)
    return Solved(pairs.eigenvalues, rows, pairs.products)


def measure(
    implementation: str,
    kind: Operator,
    start: Literal["cold", "warm"],
    problem: Problem,
    solve: Solver,
    listener: Callable[[int], None],
) -> tuple[EigenpairsRow, dict[str, Any]]:
    """Run one solver.

    Args:
        implementation: its name.
        kind: the operator.
        start: whether it was given an earlier basis.
        problem: the matrix.
        solve: the solver.
        listener: told the number of model calls so far.

    Returns:
        The row, and what has no place in it: model calls, eigenvalues and notes.
    """
    before = _in_use()
    with PeakMemory() as memory, Calls(problem.model, listener) as calls:
        clock = Stopwatch()
        found = solve(problem, kind)
        time = found.time or clock.read()
    row = EigenpairsRow(
        implementation=implementation,
        operator=kind,
        start=start,
        seconds=time.seconds,
        products=found.products,
        max_residual=max_residual(problem, kind, found),
        peak_bytes=max(0, memory.bytes - before),
    )
    order = found.values.abs().argsort(descending=True)
    values = [float(value) for value in found.values[order]]
    details = {
        "processor_seconds": time.processor_seconds,
        "model_calls": calls.count,
        "eigenvalues": values,
    }
    return row, {**details, **found.notes}


def max_residual(problem: Problem, kind: Operator, found: Solved) -> float:
    """Largest ‖Hu − λu‖/|λ|, by our operator whoever found the pairs; not timed."""
    operator = operator_of(problem, kind)
    device = problem.params[0].device
    rows = found.rows.detach().to(device, operator.dtype)
    parts = rows.split([p.numel() for p in problem.params], dim=1)
    blocks = [
        part.reshape(len(rows), *p.shape) for part, p in zip(parts, problem.params, strict=True)
    ]
    products = torch.cat([block.flatten(1) for block in operator.matmat(blocks)], dim=1)
    values = found.values.detach().to(device).double().unsqueeze(1)
    lengths = (products.double() - values * rows.double()).norm(dim=1).detach()
    return float((lengths / (rows.double().norm(dim=1) * values.abs().squeeze(1))).max())


def _in_use() -> int:
    """Memory in use, of the GPU where there is one, without what earlier runs have freed."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
