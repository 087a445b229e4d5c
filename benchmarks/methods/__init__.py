"""The rivals, by the names that configs use.

To add one: a file here with a class that follows `benchmarks.methods.base.Method`, and a line in
`METHODS`. A method that lives elsewhere is named ``path/to/file.py:Class`` or ``module:Class``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.alignguard import AlignGuard
from benchmarks.methods.base import Method, SafetyCost, Setup, TaskLoss
from benchmarks.methods.constrained_sft import ConstrainedSFT
from benchmarks.methods.early_stop import EarlyStop
from benchmarks.methods.ewc import EWC
from benchmarks.methods.kl_reference import KLReference
from benchmarks.methods.l2_reference import L2Reference
from benchmarks.methods.lisa import Lisa
from benchmarks.methods.preconditioned_sgd import PreconditionedSGDMethod
from benchmarks.methods.projected_adamw import ProjectedAdamWMethod
from benchmarks.methods.random_subspace import RandomSubspace
from benchmarks.methods.repair import Repair
from benchmarks.methods.replay import Replay
from benchmarks.methods.safegrad import SafeGrad
from benchmarks.methods.safeguard import SafeguardMethod
from benchmarks.methods.safelora import SafeLoRA
from benchmarks.methods.safety_sam import SafetySAMMethod
from benchmarks.methods.sam import ASAM, SAM
from benchmarks.methods.static_projection import StaticProjection
from benchmarks.methods.task_hessian import TaskHessian
from benchmarks.methods.ten_examples import TenExamples
from benchmarks.methods.weight_ema import WeightEMA

METHODS: dict[str, type[Method]] = {
    "adamw": AdamW,
    "weight_ema": WeightEMA,
    "early_stop": EarlyStop,
    "l2_reference": L2Reference,
    "ewc": EWC,
    "kl_reference": KLReference,
    "replay": Replay,
    "lisa": Lisa,
    "safegrad": SafeGrad,
    "constrained_sft": ConstrainedSFT,
    "static_projection": StaticProjection,
    "random_subspace": RandomSubspace,
    "task_hessian": TaskHessian,
    "safelora": SafeLoRA,
    "alignguard": AlignGuard,
    "sam": SAM,
    "asam": ASAM,
    "ten_examples": TenExamples,
    "repair": Repair,
    "projected_adamw": ProjectedAdamWMethod,
    "safety_sam": SafetySAMMethod,
    "preconditioned_sgd": PreconditionedSGDMethod,
    "safeguard": SafeguardMethod,
}


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: a key of `METHODS`, ``path/to/file.py:Class`` or ``module:Class``.

    Raises:
        ValueError: if there is no such method, or it lacks a part of `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    where, separator, attribute = name.rpartition(":")
    if not separator:
        raise ValueError(
            f"no method has this name; known are {', '.join(METHODS)}; one of your own is named "
            "path/to/file.py:Class"
        )
    try:
        module = (
            _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
        found = getattr(module, attribute)
    except Exception as error:  # whatever a stranger's file raises
        raise ValueError(
            f"this method cannot be imported ({type(error).__name__}: {error})"
        ) from error
    parts = ("Options", "step", "evaluating", "finish")
    if lacking := [part for part in parts if not hasattr(found, part)]:
        raise ValueError(f"this is no method of the benchmark: it lacks {', '.join(lacking)}")
    return found


def _from_file(path: Path) -> ModuleType:
    name = f"benchmarks_method_{path.stem}"
    if name in sys.modules and Path(sys.modules[name].__file__ or "") == path.resolve():
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # the next look would find a half of it
        del sys.modules[name]
        raise
    return module


__all__ = ["METHODS", "Method", "SafetyCost", "Setup", "TaskLoss", "method_class"]
