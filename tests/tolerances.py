"""All numerical tolerances, by dtype."""

import torch

# Relative error of a gradient against an explicit loop.
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-2}
# Relative error of eigenvalues, absolute error of inner products of unit vectors.
EIGENVALUE = {torch.float32: 1e-4, torch.float64: 1e-8}
ORTHONORMAL = {torch.float32: 1e-5, torch.float64: 1e-12}
# Absolute error of coordinates Uᵀ(θ − θ_r) for parameters of norm 1.
COORDINATE = {torch.float32: 1e-6, torch.float64: 1e-14}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
