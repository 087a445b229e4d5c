"""Curvature matrices of a loss, seen through their products with vectors."""

from safeopt.curvature.operators.base import CurvatureOperator
from safeopt.curvature.operators.fisher import FisherOperator
from safeopt.curvature.operators.ggn import GGNOperator
from safeopt.curvature.operators.hessian import HessianOperator

__all__ = ["CurvatureOperator", "FisherOperator", "GGNOperator", "HessianOperator"]
