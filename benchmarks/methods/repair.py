"""AdamW, unprotected, and `safeopt.repair` once at the end: protection after the fact."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Batch, Setup, TaskLoss
from safeopt import PassCounter, SafetyProbe, repair

_TRIAL = 8  # safety examples kept for the line search


class RepairOptions(BaseModel):
    """Options of `Repair`, as arguments of `safeopt.repair`.

    Attributes:
        held: whether the probe also has harmless prompts, whose refusal is to stay as unlikely as
            it is (`safeopt.SafetyProbe`).
        task: whether the training batches steer the repair.
    """

    model_config = ConfigDict(extra="forbid")
    budget: float = Field(default=0.01, ge=0)
    refreshes: int = Field(default=5, ge=1)
    examples: int = Field(default=32, ge=1)
    task_examples: int = Field(default=32, ge=1)
    held: bool = True
    task: bool = True


class Repair(AdamW):
    """Trains with AdamW; at the end lost refusals are restored, the training batches kept."""

    Options: ClassVar[type[BaseModel]] = RepairOptions

    def __init__(self, setup: Setup, options: RepairOptions) -> None:
        super().__init__(setup, options)
        self.options = options
        self.seen: list[Batch] = []
        self.probe = SafetyProbe(
            setup.model, setup.safety, held=setup.harmless if options.held else ()
        )
        with self.cost.clock():
            self.reference = self.probe.values(self.probe.indices)

    def step(self, task_loss: TaskLoss) -> float:
        self.seen.append(task_loss.batch)
        return super().step(task_loss)

    def finish(self) -> None:
        options = self.options
        with self.cost.clock():
            report = repair(
                self.setup.model,
                self.probe,
                budget=options.budget,
                reference=self.reference,
                task=self.seen if options.task else (),
                refreshes=options.refreshes,
                examples=options.examples,
                task_examples=options.task_examples,
                trial_examples=max(1, min(_TRIAL, len(self.probe) // 2)),
                seed=self.setup.seed,
            )
        # On task examples, too; the clock has taken the time.
        counts = {name: int(n) for name, n in report.passes.items() if name != "seconds"}
        self.cost.add_passes(PassCounter(**counts))
