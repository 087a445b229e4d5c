"""How much of a finished fine-tuning lies inside the safety subspace, and beside which controls.

For each weight matrix with change ΔW = W_after − W_before:

- **share**: ‖P ΔW‖²/‖ΔW‖², P the projector on the top k eigenvectors of that weight's safety
  curvature, estimated at the aligned model. Controls: a random direction (k/n expected) and, with
  the same singular values as ΔW and therefore the same norm and rank, random singular vectors.
- **energy kept** and **mode overlap**, the figures with which Ponkshe et al. 2025 (arXiv
  2505.14185) argue that safety has no subspace of its own. With D an alignment update, U_r its top
  r left singular vectors and V_r those of ΔW: ‖U_rU_rᵀΔW‖²/‖ΔW‖² and ‖U_rᵀV_r‖²/r. Both are
  r/d_out for random subspaces of d_out dimensions. r is no larger than the rank of either: beyond
  it singular vectors are arbitrary.

The paper takes D = W_aligned − W_unaligned. Where the unaligned model is not at hand, D is the mean
safety gradient at the aligned model: one small step of alignment. Say which one it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.diagnostics.layers import module_name
from safeopt.diagnostics.spectrum import Spectrum
from safeopt.factored import FactoredRows


@dataclass(frozen=True)
class OverlapScore:
    """One weight's figures. Where ΔW is zero its shares are 0.

    Attributes:
        name: of the module.
        parameters: number of entries n.
        norm: ‖ΔW‖ (Frobenius).
        share: share of ‖ΔW‖² inside the safety subspace.
        share_random: the same expected for a random direction, k/n.
        share_matched: mean over random matrices with ΔW's singular values; of what is no matrix as
            for a random direction.
        energy_kept: share of ‖ΔW‖² in the alignment update's top r left singular vectors; None for
            what is no matrix and where ΔW or the update is zero, likewise the following.
        mode_overlap: overlap of the top r left singular vectors of both.
        modes_random: what both are for random subspaces, r/d_out.
    """

    name: str
    parameters: int
    norm: float
    share: float
    share_random: float
    share_matched: float
    energy_kept: float | None
    mode_overlap: float | None
    modes_random: float | None


def overlap_scores(
    rows: FactoredRows,
    names: Sequence[str],
    changes: Sequence[Tensor],
    *,
    rank: int = 16,
    modes: int = 8,
    alignment: Mapping[str, Tensor] | None = None,
    draws: int = 3,
    seed: int = 0,
) -> list[OverlapScore]:
    """Score the change of each weight.

    Args:
        rows: gradients of m safety examples at the aligned model, with respect to the weights.
        names: the weights' names.
        changes: ΔW of each, in the weight's shape.
        rank: k, at least 1.
        modes: r, at least 1.
        alignment: W_aligned − W_unaligned by the weights' names; the mean safety gradient for
            those that are not there.
        draws: random matrices for the matched control, at least 1.
        seed: of the draws.

    Raises:
        ValueError: if a number is smaller than 1 or a change does not fit its weight.

    Cost: for each weight an m×m eigendecomposition and a singular value decomposition; no pass.
    """
    for name, value in (("rank", rank), ("modes", modes), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    shapes = [tuple(change.shape) for change in changes]
    if shapes != [tuple(shape) for shape in rows.shapes] or len(names) != len(changes):
        raise ValueError(
            f"changes: {len(changes)} changes for {len(rows.shapes)} weights; expected one of the "
            "same shape for each"
        )
    generator = torch.Generator().manual_seed(seed)
    given = alignment or {}
    scores = []
    for index, (name, raw) in enumerate(zip(names, changes, strict=True)):
        change = raw.detach().to(rows.dtypes[index])
        spectrum = Spectrum.of(rows.products_of(index).cpu())
        k = spectrum.rank(rank)
        norm = float(change.double().norm())

        def share(v: Tensor, i: int = index, s: Spectrum = spectrum, k: int = k) -> float:
            length = float(v.double().square().sum())
            inside = float(s.coordinates(rows.along(i, v).cpu(), k).square().sum())
            return inside / length if length > 0 else 0.0

        kept = overlap = chance = None
        matched = k / change.numel() if norm > 0 else 0.0
        if change.dim() == 2:
            u, sizes, v = torch.linalg.svd(change, full_matrices=False)
            update = given.get(name)
            if update is None:
                update = torch.zeros_like(change)
                rows.add_into(index, update, torch.full((len(rows),), 1 / len(rows), device="cpu"))
            target, strengths, _ = torch.linalg.svd(update.to(change), full_matrices=False)
            r = min(modes, _rank(sizes, change), _rank(strengths, change))
            if r:
                target = target[:, :r]
                kept = float((target.T @ change).double().square().sum()) / norm**2
                overlap = float((target.T @ u[:, :r]).double().square().sum()) / r
                chance = r / len(change)
            alike = [share(_turned(sizes, u.shape, v.shape, generator)) for _ in range(draws)]
            matched = sum(alike) / draws
        scores.append(
            OverlapScore(
                name=module_name(name),
                parameters=change.numel(),
                norm=norm,
                share=share(change),
                share_random=k / change.numel(),
                share_matched=matched,
                energy_kept=kept,
                mode_overlap=overlap,
                modes_random=chance,
            )
        )
    return scores


def _rank(sizes: Tensor, matrix: Tensor) -> int:
    """The number of singular values that are not rounding."""
    threshold = sizes.max() * max(matrix.shape) * torch.finfo(sizes.dtype).eps
    return int((sizes > threshold).sum())


def _turned(
    sizes: Tensor, left: torch.Size, right: torch.Size, generator: torch.Generator
) -> Tensor:
    """A matrix with given singular values and random singular vectors."""
    u = torch.linalg.qr(torch.randn(left, generator=generator, device="cpu").to(sizes))[0]
    v = torch.linalg.qr(torch.randn(right[::-1], generator=generator, device="cpu").to(sizes))[0]
    return (u * sizes) @ v.T
