"""What all optimizers of this package share as methods: the probe, its cost, and the last restore.

A method of ours is a file here with the optimizer's options and how it is built; its arguments,
defaults and checks are the package's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from benchmarks.methods.base import SafetyCost, Setup, TaskLoss
from safeopt import RefreshPolicy, SafetyConfig, SafetyProbe
from safeopt.probe import OPENING

# What the benchmark sets itself.
_GIVEN = {"self", "params", "lr", "probe", "optimizer"}
_FIELDS = {field.name for field in dataclasses.fields(SafetyConfig)} - {"refresh"}


class ProtectedOptions(BaseModel):
    """Any argument of the optimizer; what is not given has the package's default.

    Attributes:
        refresh: the arguments of `safeopt.RefreshPolicy`.
        held: whether the probe also has harmless prompts, whose refusal is to stay as unlikely as
            it is (`safeopt.SafetyProbe`).
        prompts: how many of the safety prompts the probe gets; None for all.
        opening: how many tokens of the refusals it uses (`safeopt.SafetyProbe`); None for all.
    """

    model_config = ConfigDict(extra="allow")
    optimizer_class: ClassVar[Callable[..., Any]]
    # Fields of `SafetyConfig` that the optimizer calls otherwise: its name, then the field's.
    renamed: ClassVar[dict[str, str]] = {}
    refresh: dict[str, Any] | None = None
    held: bool = False
    prompts: int | None = Field(default=None, ge=1)
    opening: int | None = Field(default=OPENING, ge=1)

    @classmethod
    def arguments_known(cls) -> set[str]:
        """Names of the optimizer's own arguments."""
        parameters = inspect.signature(cls.optimizer_class).parameters.values()
        return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - _GIVEN

    @model_validator(mode="after")
    def _are_arguments(self) -> ProtectedOptions:
        known, given = self.arguments_known(), self.model_extra or {}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"{', '.join(unknown)}: no argument of {self.optimizer_class.__name__}; known are "
                f"{', '.join(sorted(known))}"
            )
        own = _FIELDS - set(self.renamed.values())
        SafetyConfig(**{name: value for name, value in given.items() if name in own})
        for name in set(given) & set(self.renamed):
            field = self.renamed[name]
            try:
                SafetyConfig(**{field: given[name]})
            except ValueError as error:
                raise ValueError(str(error).replace(f"{field}=", f"{name}=", 1)) from None
        self.policy()
        return self

    def policy(self) -> RefreshPolicy | None:
        """The refresh policy, or None for the package's default."""
        if self.refresh is None:
            return None
        try:
            return RefreshPolicy(**self.refresh)
        except TypeError as error:
            raise ValueError(
                f"refresh={self.refresh}: no arguments of RefreshPolicy ({error})"
            ) from error

    def arguments(self) -> dict[str, Any]:
        """What is passed to the optimizer."""
        policy = self.policy()
        return {**(self.model_extra or {}), **({"refresh": policy} if policy else {})}


class ProtectedMethod:
    """A protected optimizer; at the end the alignment loss is measured and, if need be, restored.

    Args:
        setup: of the run.
        options: the optimizer's arguments.
    """

    Options: ClassVar[type[BaseModel]]

    def __init__(self, setup: Setup, options: ProtectedOptions) -> None:
        self.probe = SafetyProbe(
            setup.model,
            setup.safety[: options.prompts],
            held=setup.harmless if options.held else (),
            opening=options.opening,
        )
        self._clock = SafetyCost()
        self.optimizer = self.build_optimizer(setup, options)

    def build_optimizer(self, setup: Setup, options: ProtectedOptions) -> Any:
        return type(options).optimizer_class(
            setup.params, lr=setup.learning_rate, probe=self.probe, **options.arguments()
        )

    @property
    def cost(self) -> SafetyCost:
        """The probe's passes; the time of the whole optimizer step is charged to safety.

        That includes the base optimizer's own arithmetic, which cannot be told apart from outside:
        an overcount of well below one percent of a step for adapters.
        """
        cost = SafetyCost(seconds=self._clock.seconds)
        cost.add_passes(self.probe.passes)
        return cost

    def step(self, task_loss: TaskLoss) -> float:
        self.optimizer.zero_grad()
        loss = task_loss()
        loss.backward()
        with self._clock.clock():
            self.optimizer.step()
        return float(loss.detach())

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        if self.optimizer.safety.active:
            with self._clock.clock():
                self.optimizer.restore()
