"""Safe LoRA: after training, updates that point away from the alignment are projected onto it.

Hsu et al. 2024, "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large
Language Models" (arXiv 2405.16833). For each layer V = W_aligned − W_unaligned and
C = VVᵀ/‖V‖_F; where cos(ΔW, C·ΔW) is below a threshold, ΔW becomes C·ΔW. This implementation is
ours (Apache-2.0), from the paper's equations.

Simplified: nothing for adapters. Without adapters ΔW is the change of each matrix that differs
between the aligned and the unaligned model; the paper has adapters only. C is the paper's fast
approximation, no exact projector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from benchmarks.methods.adamw import AdamW
from benchmarks.methods.base import Setup, snapshot

ADAPTER, WRAPPED = "default", "base_model.model."


class SafeLoRAOptions(BaseModel):
    """Options of `SafeLoRA`.

    Attributes:
        threshold: layers whose cosine is below it are projected; above 1 all are.
    """

    model_config = ConfigDict(extra="forbid")
    threshold: float = Field(default=0.5, ge=0)


class SafeLoRA(AdamW):
    """AdamW, and the projection once at the end. No safety example is used.

    Raises:
        ValueError: if the config names no model from before the alignment.
    """

    Options: ClassVar[type[BaseModel]] = SafeLoRAOptions

    def __init__(self, setup: Setup, options: SafeLoRAOptions) -> None:
        super().__init__(setup, options)
        if setup.unaligned is None:
            raise ValueError(
                "safelora: it needs the model from before the alignment; name it as "
                "model.unaligned in the config"
            )
        self.unaligned = setup.unaligned
        self.threshold = options.threshold
        self.projected: list[str] = []
        self.reference = snapshot(setup.params)

    def finish(self) -> None:
        with self.cost.clock():
            # With gradients: the tiny model from before the alignment may have to be trained first.
            self._project_all(self.unaligned())

    @torch.no_grad()
    def _project_all(self, before: Mapping[str, Tensor]) -> None:
        adapted = list(_adapted_layers(self.setup.model))
        if adapted:
            for name, layer in adapted:
                b, a = (
                    factors[ADAPTER].get_parameter("weight")
                    for factors in (layer.lora_B, layer.lora_A)
                )
                aligned = layer.get_base_layer().get_parameter("weight")
                self._project(name, b, b @ a, aligned - before[name].to(aligned))
        else:
            names = {id(p): name for name, p in self.setup.model.named_parameters()}
            for parameter, start in zip(self.setup.params, self.reference, strict=True):
                name = names[id(parameter)]
                if parameter.ndim == 2 and name in before:
                    delta = parameter - start
                    if self._project(name, delta, delta, start - before[name].to(start)):
                        parameter.copy_(start + delta)

    def _project(self, name: str, factor: Tensor, change: Tensor, alignment: Tensor) -> bool:
        """Multiply ``factor``, the left one of ``change``, by C in place, if ΔW turns away."""
        norm = alignment.norm()
        if norm == 0:
            return False  # the alignment did not touch this layer, so it gives no direction
        # C·x = V(Vᵀx)/‖V‖, without forming C.
        projected = alignment @ (alignment.T @ change) / norm
        cosine = F.cosine_similarity(change.flatten(), projected.flatten(), dim=0)
        if float(cosine) >= self.threshold:
            return False
        factor.copy_(alignment @ (alignment.T @ factor) / norm)
        self.projected.append(name)
        return True


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(WRAPPED) + ".weight", module
