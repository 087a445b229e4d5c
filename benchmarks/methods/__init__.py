"""The rivals, by the names that configs use.

To add one: a file here with a class that follows `benchmarks.methods.base.Method`, and a line in
`METHODS`.
"""

from __future__ import annotations

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Method, SafetyCost, Setup, TaskLoss
from benchmarks.methods.projected_adamw import ProjectedAdamWMethod
from benchmarks.methods.replay import Replay

METHODS: dict[str, type[Method]] = {
    "adamw": AdamW,
    "replay": Replay,
    "projected_adamw": ProjectedAdamWMethod,
}

__all__ = ["METHODS", "Method", "SafetyCost", "Setup", "TaskLoss"]
