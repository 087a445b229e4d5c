"""SafeGrad: where task and safety gradient conflict, the task's is projected off the safety's.

Yi et al. 2025, "Gradient Surgery for Safe LLM Fine-Tuning" (arXiv 2508.07172), which takes the
projection of Yu et al. 2020, "Gradient Surgery for Multi-Task Learning" (PCGrad, arXiv 2001.06782),
for the task's gradient only and a KL divergence to the aligned model as safety loss. This
implementation is ours (Apache-2.0), from the paper's description.

Simplified: the divergence is a lower bound from the 32 most likely tokens and one remainder class.
"""

from __future__ import annotations

import torch

from benchmarks.methods.kl_reference import KLReference


class SafeGrad(KLReference):
    """g ← g_t − min(0, g_tᵀg_s)/‖g_s‖²·g_s + weight·g_s."""

    def after_backward(self) -> None:
        safety = self.kl_gradient()
        with self.cost.clock(), torch.no_grad():
            pairs = [
                (parameter.grad, gradient)
                for parameter, gradient in zip(self.setup.params, safety, strict=True)
                if parameter.grad is not None
            ]
            inner = sum(float((task * other).sum()) for task, other in pairs)
            square = sum(float(other.square().sum()) for _, other in pairs)
            # At the aligned model the divergence is smallest and its gradient zero.
            conflict = min(0.0, inner) / square if square > 0 else 0.0
            for task, other in pairs:
                task += (self.weight - conflict) * other
