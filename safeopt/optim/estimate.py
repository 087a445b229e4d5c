"""One estimate of the safety subspace: draw examples, look at them, renew the subspace."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safeopt.curvature.bases import choose_basis
from safeopt.curvature.bases.int8 import Int8Basis
from safeopt.curvature.basis import DenseBasis
from safeopt.curvature.subspace import SafetySubspace, updated_subspace
from safeopt.curvature.window import slopes
from safeopt.distributed import Layout
from safeopt.optim.config import SafetyConfig
from safeopt.optim.elastic import squares
from safeopt.optim.examples import ExampleRota, Look
from safeopt.optim.measurement import finite
from safeopt.probe import SafetyProbe
from safeopt.rows import DenseRows, GradientRows

logger = logging.getLogger("safeopt")


class Estimate(NamedTuple):
    """What a refresh finds.

    Attributes:
        subspace: the renewed one.
        look: the examples that were drawn.
        squares: for each parameter the sum of the squared gradients of the safety examples'
            log-odds, shape ``(*p.shape)``; None where there is no pull.
    """

    subspace: SafetySubspace
    look: Look
    squares: list[Tensor] | None


def estimate(
    previous: SafetySubspace | None,
    params: Sequence[Tensor],
    probe: SafetyProbe,
    rota: ExampleRota,
    config: SafetyConfig,
    count: int,
) -> Estimate:
    """Renew the subspace at ``params`` from the examples whose turn it is; their turn ends.

    Args:
        previous: the last estimate; None at the start.
        params: the protected parameters.
        probe: the examples.
        rota: whose turn it is.
        config: rank, window, storage and curvature.
        count: number of safety examples; for four of them, three held ones join them.

    Returns:
        What was found. Cost: one forward and one backward pass on the examples.

    Raises:
        ValueError: if a parameter does not belong to the probe's model.
        FloatingPointError: if a loss is not finite.
    """
    layout = probe.layout(params)
    kind = basis_kind(previous, params, probe, config)
    look = rota.next(count)
    losses, rows = gradient_rows(probe, params, look.indices, kind, layout)
    finite(float(losses.sum()))
    tokens = probe.response_tokens(look.indices)
    targets = rota.targets(look)
    found = None
    if pulls(config, kind):
        factors = slopes(losses.to(tokens), tokens)
        found = squares(rows, factors[: len(look.safety)])
    if config.curvature == "random":
        rows = _random(rows, config.seed + rota.drawn)
    subspace = updated_subspace(
        previous,
        params,
        rows,
        losses,
        tokens,
        targets,
        rank=config.rank,
        window=config.window,
        kind=kind,
        layout=layout,
    )
    rota.advance(look)
    return Estimate(subspace, look, found)


def pulls(config: SafetyConfig, kind: str) -> bool:
    """Whether parameters are pulled back to the aligned model, see `safeopt.optim.elastic`.

    Args:
        config: the choices.
        kind: how the basis is stored.
    """
    affordable = kind in (DenseBasis.kind, Int8Basis.kind)
    return config.elastic > 0 and config.curvature == "fisher" and affordable


def warn_without_pull(config: SafetyConfig, kind: str) -> None:
    """Log a warning where ``elastic`` asks for a pull and there is none, see `pulls`.

    Args:
        config: the choices.
        kind: how the basis is stored.
    """
    if config.elastic == 0 or pulls(config, kind):
        return
    if config.curvature != "fisher":
        reason, remedy = f'curvature="{config.curvature}"', 'curvature="fisher"'
    else:
        reason, remedy = f'a basis that is stored as "{kind}"', 'basis="dense" or basis="int8"'
    logger.warning(
        "elastic=%g: with %s nothing is pulled back to the aligned model; use %s, or elastic=0",
        config.elastic,
        reason,
        remedy,
    )


def basis_kind(
    previous: SafetySubspace | None,
    params: Sequence[Tensor],
    probe: SafetyProbe,
    config: SafetyConfig,
) -> str:
    """How the basis is stored, or will be, see `safeopt.curvature.bases`."""
    if previous is not None:
        return previous.basis.kind
    layout = probe.layout(params)
    return choose_basis(config.basis, params, config.rank, probe.model, layout)


def gradient_rows(
    probe: SafetyProbe, params: Sequence[Tensor], indices: Sequence[int], kind: str, layout: Layout
) -> tuple[Tensor, GradientRows]:
    """Losses and gradients of examples, in the storage that the basis is made from."""
    if kind in ("factored", "compressed"):
        return probe.factored(params, indices)
    losses, rows = probe.per_example(params, indices)
    return losses, DenseRows(rows, layout)


def _random(rows: GradientRows, seed: int) -> GradientRows:
    """Rows of the same lengths in random directions: the control experiment."""
    noise = rows.noise(torch.Generator().manual_seed(seed))
    lengths = (rows.products().diagonal() / noise.products().diagonal()).sqrt()
    return noise.scaled(lengths)
