"""Ours: `safeopt.ProjectedAdamW`, AdamW followed by a small step in the safety subspace."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from benchmarks.methods.base import SafetyCost, Setup, TaskLoss
from safeopt import ProjectedAdamW, RefreshPolicy, SafetyConfig, SafetyProbe

# What the benchmark sets itself.
_GIVEN = {"self", "params", "lr", "probe"}


class ProjectedAdamWOptions(BaseModel):
    """Any argument of `safeopt.ProjectedAdamW`; what is not given has the package's default.

    Attributes:
        refresh: the arguments of `safeopt.RefreshPolicy`.
        held: whether the probe also has harmless prompts, whose refusal is to stay as unlikely as
            it is (`safeopt.SafetyProbe`).
    """

    model_config = ConfigDict(extra="allow")
    refresh: dict[str, Any] | None = None
    held: bool = False

    @model_validator(mode="after")
    def _are_arguments(self) -> ProjectedAdamWOptions:
        known = set(inspect.signature(ProjectedAdamW.__init__).parameters) - _GIVEN
        if unknown := sorted(set(self.model_extra or {}) - known):
            raise ValueError(
                f"{', '.join(unknown)}: no argument of ProjectedAdamW; known are "
                f"{', '.join(sorted(known))}"
            )
        checked = {field.name for field in dataclasses.fields(SafetyConfig)} - {"refresh"}
        SafetyConfig(**{k: v for k, v in (self.model_extra or {}).items() if k in checked})
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


class ProjectedAdamWMethod:
    """AdamW, protected; at the end the alignment loss is measured and, if need be, restored."""

    Options: ClassVar[type[BaseModel]] = ProjectedAdamWOptions

    def __init__(self, setup: Setup, options: ProjectedAdamWOptions) -> None:
        self.probe = SafetyProbe(
            setup.model, setup.safety, held=setup.harmless if options.held else ()
        )
        self.optimizer = ProjectedAdamW(
            setup.params, lr=setup.learning_rate, probe=self.probe, **options.arguments()
        )
        self._clock = SafetyCost()

    @property
    def cost(self) -> SafetyCost:
        """The probe's passes; the time of the whole optimizer step is charged to safety.

        That includes AdamW's own arithmetic, which cannot be told apart from outside: an overcount
        of well below one percent of a step for adapters.
        """
        passes = self.probe.passes
        return SafetyCost(
            forward=passes.forward,
            backward=passes.backward,
            forward_tokens=passes.forward_tokens,
            backward_tokens=passes.backward_tokens,
            seconds=self._clock.seconds,
        )

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
        with self._clock.clock():
            self.optimizer.restore()
