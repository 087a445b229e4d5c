"""SAM and ASAM, from the package ``pytorch_optimizer`` (Apache-2.0).

Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization" (arXiv
2010.01412); Kwon et al. 2021, "ASAM" (arXiv 2102.11600), whose perturbation is scaled by the
parameters. Both look for flat minima of the task and know nothing of safety. The second pass of
each step is a task pass and is counted as such.

Simplified: as in the package, ASAM lacks the small constant that the paper adds to |θ|; what is
zero, as an adapter's B at its start, is not perturbed. SAM is whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, TaskLoss

if TYPE_CHECKING:
    import pytorch_optimizer


class SAMOptions(BaseModel):
    """Options of `SAM` and `ASAM`.

    Attributes:
        rho: radius of the perturbation.
    """

    model_config = ConfigDict(extra="forbid")
    rho: float = Field(default=0.05, gt=0)


class SAM(AdamW):
    """AdamW with the gradient at θ + rho·g/‖g‖: two passes a step."""

    Options: ClassVar[type[BaseModel]] = SAMOptions
    adaptive: ClassVar[bool] = False
    optimizer: pytorch_optimizer.SAM

    def __init__(self, setup: Setup, options: SAMOptions) -> None:
        self.rho = options.rho
        super().__init__(setup, options)

    def build_optimizer(self) -> pytorch_optimizer.SAM:
        import pytorch_optimizer  # its import takes a second, and only two methods need it

        return pytorch_optimizer.SAM(
            self.setup.params,
            torch.optim.AdamW,
            rho=self.rho,
            adaptive=self.adaptive,
            lr=self.setup.learning_rate,
        )

    def step(self, task_loss: TaskLoss) -> float:
        self.optimizer.zero_grad()
        loss = task_loss()
        loss.backward()
        self.optimizer.first_step(zero_grad=True)
        task_loss().backward()
        self.optimizer.second_step()
        return float(loss.detach())


class ASAM(SAM):
    """SAM with a perturbation in proportion to the squared parameters."""

    adaptive: ClassVar[bool] = True
