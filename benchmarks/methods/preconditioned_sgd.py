"""Ours: `safeopt.PreconditionedSGD`, SGD divided by the safety curvature."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from benchmarks.methods.protected import ProtectedMethod, ProtectedOptions
from safeopt import PreconditionedSGD


class PreconditionedSGDOptions(ProtectedOptions):
    """Any argument of `safeopt.PreconditionedSGD`."""

    optimizer_class = PreconditionedSGD


class PreconditionedSGDMethod(ProtectedMethod):
    """SGD, preconditioned; its learning rate is to be of SGD's size, not AdamW's."""

    Options: ClassVar[type[BaseModel]] = PreconditionedSGDOptions
