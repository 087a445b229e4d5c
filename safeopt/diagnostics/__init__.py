"""Know before, watch during, prove after: diagnostics of a fine-tuning run."""

from safeopt.diagnostics.conditions import Condition, Figures, Thresholds
from safeopt.diagnostics.diagnosis import Diagnosis, diagnose
from safeopt.diagnostics.layers import LayerShare
from safeopt.diagnostics.verdict import Verdict

__all__ = [
    "Condition",
    "Diagnosis",
    "Figures",
    "LayerShare",
    "Thresholds",
    "Verdict",
    "diagnose",
]
