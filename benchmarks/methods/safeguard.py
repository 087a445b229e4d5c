"""Ours: `safeopt.safeguard` around an optimizer of torch or bitsandbytes, named in the config."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, field_validator

from benchmarks.methods.base import Setup
from benchmarks.methods.protected import ProtectedMethod, ProtectedOptions
from safeopt import SafetyConfig, safeguard


class SafeguardOptions(ProtectedOptions):
    """Any field of `safeopt.SafetyConfig`.

    Attributes:
        base: a class of ``torch.optim``, else of ``bitsandbytes.optim``.
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
        _base_class(name)
        return name


def _base_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer of that name.

    Raises:
        ValueError: if neither package has it, or bitsandbytes, where needed, cannot be imported.
    """
    module: ModuleType = torch.optim
    if not hasattr(torch.optim, name):  # bitsandbytes takes seconds to import
        try:
            module = import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ValueError(
                f"torch.optim has no such optimizer, and bitsandbytes cannot be imported ({error})"
            ) from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    raise ValueError("neither torch.optim nor bitsandbytes.optim has this optimizer")


class SafeguardMethod(ProtectedMethod):
    """An optimizer, protected."""

    Options: ClassVar[type[BaseModel]] = SafeguardOptions

    def __init__(self, setup: Setup, options: SafeguardOptions) -> None:
        self._base = _base_class(options.base), options.base_options
        super().__init__(setup, options)

    def build_optimizer(self, setup: Setup, options: ProtectedOptions) -> Any:
        build, arguments = self._base
        base = build(setup.params, lr=setup.learning_rate, **arguments)
        return safeguard(base, self.probe, **options.arguments())
