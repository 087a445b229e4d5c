"""Ours: `safeopt.safeguard` around an optimizer of torch, named in the config."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from benchmarks.methods.base import Setup
from benchmarks.methods.protected import ProtectedMethod, ProtectedOptions
from safeopt import SafetyConfig, safeguard


class SafeguardOptions(ProtectedOptions):
    """Any field of `safeopt.SafetyConfig`.

    Attributes:
        base: a class of ``torch.optim``.
        base_options: its arguments, beside the learning rate.
    """

    optimizer_class = safeguard
    base: str = "AdamW"
    base_options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def arguments_known(cls) -> set[str]:
        return super().arguments_known() | set(SafetyConfig.__dataclass_fields__)

    @field_validator("base")
    @classmethod
    def _known(cls, name: str) -> str:
        known = getattr(torch.optim, name, None)
        if not (isinstance(known, type) and issubclass(known, torch.optim.Optimizer)):
            raise ValueError(f"torch.optim has no optimizer {name}")
        return name


class SafeguardMethod(ProtectedMethod):
    """A torch optimizer, protected."""

    Options: ClassVar[type[ProtectedOptions]] = SafeguardOptions

    def __init__(self, setup: Setup, options: SafeguardOptions) -> None:
        self._base = getattr(torch.optim, options.base), options.base_options
        super().__init__(setup, options)

    def build_optimizer(self, setup: Setup, arguments: dict[str, Any]) -> Any:
        cls, options = self._base
        return safeguard(
            cls(setup.params, lr=setup.learning_rate, **options), self.probe, **arguments
        )
