"""A model with two known Hessians: a quadratic task loss and a quadratic alignment loss.

Task:       L(x) = ½ xᵀHx + qᵀx, with q chosen so that ∇L(x₀) is given
Alignment:  example i has ℓ_i(x) = ½ κ ((x − x₀)ᵀû_i)² + (x − x₀)ᵀu_i, û_i = u_i/‖u_i‖

so that the Fisher matrix at x₀ is the mean of u_i u_iᵀ. x is all parameters in one vector, float64.
"""

from __future__ import annotations

import torch
from scipy.linalg import expm
from torch import Tensor, nn

from safeopt import SafetyProbe


class Quadratic(nn.Module):
    def __init__(
        self, hessian: Tensor, gradient: Tensor, shapes=None, *, dtype=torch.float64, seed=0
    ) -> None:
        super().__init__()
        n = len(gradient)
        generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        self.hessian, self.slope = hessian.to(dtype), gradient.to(dtype)
        shapes = [(n,)] if shapes is None else shapes
        pieces = self.start.split([torch.Size(shape).numel() for shape in shapes])
        self.weights = nn.ParameterList(
            nn.Parameter(piece.clone().view(shape))
            for piece, shape in zip(pieces, shapes, strict=True)
        )

    @property
    def x(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.weights])

    @property
    def moved(self) -> Tensor:
        """x − x₀, detached."""
        return (self.x - self.start).detach()

    def task(self) -> Tensor:
        d = self.x - self.start
        return 0.5 * d @ self.hessian @ d + self.slope @ d

    def task_gradient(self, d: Tensor) -> Tensor:
        """∇L at x₀ + d."""
        return self.hessian @ d + self.slope

    def flow(self, time: float) -> Tensor:
        """x(t) − x₀ under gradient flow: −∫₀ᵗ exp(−Hs) ds ∇L(x₀)."""
        n = len(self.slope)
        block = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        block[:n, :n], block[:n, n] = -self.hessian, -self.slope
        return torch.from_numpy(expm((block * time).numpy())[:n, n])

    def closure(self, optimizer) -> float:
        optimizer.zero_grad()
        loss = self.task()
        loss.backward()
        return float(loss.detach())


def probe_of(model: Quadratic, directions: Tensor, *, sharpness: float = 1.0) -> SafetyProbe:
    """A probe with one safety example for each row u_i of ``directions``."""
    directions = directions.to(model.start)
    norms = directions.norm(dim=1, keepdim=True)
    units = directions / torch.where(norms > 0, norms, torch.ones_like(norms))

    def losses(module: Quadratic, batch) -> Tensor:
        index = batch["input_ids"][:, 0]
        d = module.x - module.start
        return 0.5 * sharpness * (units[index] @ d) ** 2 + directions[index] @ d

    ids = torch.arange(len(directions)).view(-1, 1).expand(-1, 2)
    return SafetyProbe(model, [{"input_ids": ids, "labels": ids}], loss=losses)


def dense_basis(optimizer) -> Tensor:
    """U as an n×k matrix in float64, read through the basis's own expansion."""
    subspace, params = optimizer.safety.subspace, optimizer.safety.probe.model.weights
    columns = []
    for unit in torch.eye(subspace.rank, dtype=torch.float64):
        column = [torch.zeros_like(p) for p in params]
        subspace.basis.expand_into(column, unit)
        columns.append(torch.cat([part.flatten() for part in column]))
    return torch.stack(columns, dim=1).double()


def orthogonal(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
