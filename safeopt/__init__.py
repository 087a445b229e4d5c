"""safeopt: fine-tune an aligned language model without losing its alignment."""

from safeopt.curvature.refresh import RefreshPolicy
from safeopt.diagnostics import Diagnosis, diagnose
from safeopt.diagnostics.monitor import SafetyMonitor
from safeopt.losses import ReferenceKL, refusal_nll
from safeopt.optim import (
    OptimizerInfo,
    PreconditionedSGD,
    ProjectedAdamW,
    SafetySAM,
    optimizers,
    safeguard,
)
from safeopt.optim.config import SafetyConfig
from safeopt.optim.geometry import SafetyGeometry
from safeopt.optim.measurement import Measurement
from safeopt.optim.repair import RepairReport, repair
from safeopt.passes import PassCounter
from safeopt.probe import SafetyProbe

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Measurement",
    "OptimizerInfo",
    "PassCounter",
    "PreconditionedSGD",
    "ProjectedAdamW",
    "ReferenceKL",
    "RefreshPolicy",
    "RepairReport",
    "SafetyConfig",
    "SafetyGeometry",
    "SafetyMonitor",
    "SafetyProbe",
    "SafetySAM",
    "diagnose",
    "optimizers",
    "refusal_nll",
    "repair",
    "safeguard",
]
