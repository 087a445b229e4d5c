"""Public implementations of the same eigenpairs, each used as its own documentation says.

All of them compute attention by its plain formula ("math"): the fused kernels have no second
derivative. All get the same single batch and the same start of a random seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.problem import Scored, scored_targets
from benchmarks.curvature.timing import Stopwatch, Time

Operator = Literal["hessian", "ggn"]
# Steps that hessian-eigenthings is asked for, one after the other until it reports convergence.
LANCZOS_STEPS = (16, 32, 48, 64, 96, 144)


class PeerMissingError(Exception):
    """A peer that cannot be used, with the reason."""


@dataclass(frozen=True)
class Problem:
    """The matrix whose top eigenpairs are wanted.

    Attributes:
        model: with adapters, in evaluation mode.
        params: the adapters' parameters.
        batch: safety prompts with their refusals.
        rank: number of eigenpairs, those with the largest |λ|.
        tolerance: largest relative residual.
    """

    model: nn.Module
    params: list[nn.Parameter]
    batch: dict[str, Tensor]
    rank: int
    tolerance: float


@dataclass(frozen=True)
class Solved:
    """Approximate eigenpairs.

    Attributes:
        values: shape ``(k,)``.
        rows: eigenvectors, shape ``(k, n)``.
        products: matrix-vector products spent.
        notes: what a reader must know about the run.
        time: of the part that counts; None for all of it.
    """

    values: Tensor
    rows: Tensor
    products: int
    notes: dict[str, Any] = field(default_factory=dict)
    time: Time | None = None


Solver = Callable[[Problem, Operator], Solved]


@dataclass(frozen=True)
class Peer:
    """A peer.

    Attributes:
        name: as results list it.
        package: its distribution.
        module: its import name.
        operators: those that it has.
        solve: computes the eigenpairs.
    """

    name: str
    package: str
    module: str
    operators: tuple[Operator, ...]
    solve: Solver


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def imported(module: str, package: str) -> Any:
    """A peer's module.

    Raises:
        PeerMissingError: if it is not installed, or does not work with what is.
    """
    try:
        return import_module(module)
    except Exception as error:
        raise PeerMissingError(
            f"{package} cannot be imported ({type(error).__name__}: {error}); `make setup` "
            "installs the peers, or `pip install --no-deps -r oracles.txt`"
        ) from error


def run_peer(peer: Peer, problem: Problem, operator: Operator) -> Solved:
    """Solve with a peer; gradients that it leaves on the model are removed.

    Raises:
        PeerMissingError: if it is not installed.
    """
    imported(peer.module, peer.package)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on `backward(create_graph=True)`
            return peer.solve(problem, operator)
    finally:
        problem.model.zero_grad(set_to_none=True)


@contextmanager
def silu_by_parts(model: nn.Module) -> Iterator[int]:
    """SiLU written as x·sigmoid(x): torch has no forward-mode rule for its backward pass.

    Yields:
        How many activations were rewritten.
    """
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.SiLU)]
    found += [m for m in model.modules() if type(m).__name__ == "SiLUActivation"]
    for module in found:
        module.forward = _silu
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _curvlinops(problem: Problem, operator: Operator) -> Solved:
    """Their operator under scipy's eigsh (ARPACK), whose tolerance is that of our solvers."""
    with silu_by_parts(problem.model) as rewritten:
        found = _curvlinops_eigsh(problem, operator)
    return replace(found, notes={"SiLU activations rewritten as x*sigmoid(x)": rewritten})


def _curvlinops_eigsh(problem: Problem, operator: Operator) -> Solved:
    curvlinops = imported("curvlinops", "curvlinops-for-pytorch")
    build = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}
    linear = build[operator](
        Scored(problem.model),
        nn.CrossEntropyLoss(),
        problem.params,
        [(problem.batch, scored_targets(problem.batch))],
        check_deterministic=False,
        batch_size_fn=lambda batch: len(batch["input_ids"]),
    ).to_scipy()
    products = 0

    def matvec(vector: Any) -> Any:
        nonlocal products
        products += 1
        return linear @ vector

    counted = LinearOperator(linear.shape, matvec=matvec, dtype=linear.dtype)
    start = np.random.default_rng(0).standard_normal(linear.shape[0]).astype(linear.dtype)
    values, vectors = eigsh(counted, k=problem.rank, which="LM", tol=problem.tolerance, v0=start)
    return Solved(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()), products)


def _eigenthings(problem: Problem, operator: Operator) -> Solved:
    """Their Lanczos, which takes a fixed number of steps and says afterwards what has converged.

    The steps are raised until all pairs have. A user would pay for all attempts; here the last one
    alone counts, which is the best that can be said of it.
    """
    theirs = imported("hessian_eigenthings", "hessian-eigenthings")
    model, batches = Scored(problem.model), [problem.batch]
    chosen = {id(p) for p in problem.params}
    options = {"param_filter": lambda name, p: id(p) in chosen}
    cross_entropy = nn.CrossEntropyLoss()

    def loss_of(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, scored_targets(batch))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return loss_of(module(batch), batch)

    for steps in LANCZOS_STEPS:
        clock = Stopwatch()
        if operator == "hessian":
            linear = theirs.HessianOperator(model, batches, loss, **options)
        else:
            linear = theirs.GGNOperator(
                model, batches, lambda module, batch: module(batch), loss_of, **options
            )
        found = theirs.lanczos(
            linear, k=problem.rank, max_iter=min(steps, linear.size), tol=problem.tolerance,
            reorthogonalize=True, which="LM", seed=0,
        )  # fmt: skip
        time = clock.read()
        if bool(found.converged.all()):
            break
    tried = LANCZOS_STEPS[: LANCZOS_STEPS.index(steps) + 1]
    notes = {"steps asked for, one attempt after the other": list(tried)}
    return Solved(found.eigenvalues, found.eigenvectors, found.iterations, notes, time)


def _pyhessian(problem: Problem, operator: Operator) -> Solved:
    """Their power iteration with deflation, which stops where an eigenvalue changes little.

    That says nothing about the residual: it is what it is. `tol` is given as it is meant there.
    """
    pyhessian = imported("pyhessian", "pyhessian")
    inner = imported("pyhessian.hessian", "pyhessian")
    original, products = inner.hessian_vector_product, 0

    def counted(*arguments: Any) -> Any:
        nonlocal products
        products += 1
        return original(*arguments)

    inner.hessian_vector_product = counted
    torch.manual_seed(0)
    try:
        data = (problem.batch, scored_targets(problem.batch))
        computer = pyhessian.hessian(
            Scored(problem.model), nn.CrossEntropyLoss(), data=data, cuda=False
        )
        computer.device = str(problem.params[0].device)  # cuda=True cannot take a batch by names
        values, vectors = computer.eigenvalues(tol=problem.tolerance, top_n=problem.rank)
    finally:
        inner.hessian_vector_product = original
    rows = torch.stack([torch.cat([part.detach().flatten() for part in v]) for v in vectors])
    return Solved(torch.tensor(values), rows, products)


PEERS = (
    Peer(
        "curvlinops + eigsh", "curvlinops-for-pytorch", "curvlinops", ("hessian", "ggn"),
        _curvlinops,
    ),
    Peer(
        "hessian-eigenthings", "hessian-eigenthings", "hessian_eigenthings", ("hessian", "ggn"),
        _eigenthings,
    ),
    Peer("pyhessian", "pyhessian", "pyhessian", ("hessian",), _pyhessian),
)  # fmt: skip
