"""Ours: `safeopt.ProjectedAdamW`, AdamW followed by a small step in the safety subspace."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from benchmarks.methods.protected import ProtectedMethod, ProtectedOptions
from safeopt import ProjectedAdamW


class ProjectedAdamWOptions(ProtectedOptions):
    """Any argument of `safeopt.ProjectedAdamW`."""

    optimizer_class = ProjectedAdamW


class ProjectedAdamWMethod(ProtectedMethod):
    """AdamW, protected."""

    Options: ClassVar[type[BaseModel]] = ProjectedAdamWOptions
