"""PEFT: which parameters are protected, and which model is the reference.

**Parameters.** Those that train: of several adapters the active ones (`peft` freezes the others),
and what the configuration trains beside them.

**Reference.** With ``loss="kl"`` the alignment loss is the distance from the aligned model. PEFT
keeps that model inside: it is the same one with the adapters switched off, and no second model is
held in memory. That is right unless

- the adapter's initialisation changed the base model (PiSSA, OLoRA, CorDA, LoftQ, …),
- parameters of the base model train, too (``bias="all"``, or unfrozen by hand),
- the alignment itself sits in an adapter, so that the base model refuses less firmly.

Then the reference is the model as it stands when the probe is made, before training.

**What works.** LoRA with its variants (DoRA, rsLoRA, PiSSA, …) and IA³; prompt and prefix
tuning without padding, one example a pass. AdaLoRA is refused: it zeroes directions of the
parameters between two steps, which the protection would take for drift and undo.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn

from safeopt.integrations.versions import require

require("peft")

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from safeopt.isolation import trainability_kept
from safeopt.losses import Batch, ReferenceKL
from safeopt.probe import SafetyProbe

logger = logging.getLogger("safeopt")

Reference = Literal["auto", "base", "start"]
# Values of init_lora_weights that leave the base model as it is.
_LEAVES_BASE = (True, False, "gaussian", "eva", "orthogonal")
_REFUSED = {"ADALORA": "it prunes its ranks between two steps; use LoRA, DoRA or rsLoRA"}
_COMPARED = 8  # examples that decide which model refuses more firmly


class BaseReferenceKL(ReferenceKL):
    """KL to the base model: the reference is computed with the adapters switched off.

    It does not matter when: a resumed run finds the same reference in its drifted model.
    """

    def cache(self, model: nn.Module, batch: Batch) -> None:
        """Store the base model's log-probabilities of a batch: one forward pass."""
        with adapters_off(_peft_model(model)):
            super().cache(model, batch)


def safety_probe(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    held: Sequence[Batch] = (),
    loss: Literal["nll", "kl"] = "nll",
    opening: int | None = None,
    reference: Reference = "auto",
) -> SafetyProbe:
    """A `SafetyProbe` of a PEFT model.

    Args:
        model: the model that is trained, with its adapters.
        batches: see `SafetyProbe`.
        held: see `SafetyProbe`.
        loss: see `SafetyProbe`.
        opening: see `SafetyProbe`.
        reference: of ``loss="kl"``: ``"base"``, the model with its adapters off; ``"start"``, the
            model as it is now; ``"auto"`` chooses as this module describes.

    Raises:
        TypeError: if ``model`` is no PEFT model, or its kind of adapter cannot be protected.
        ValueError: if an adapter is merged, nothing trains, or ``reference`` is unknown or
            impossible.

    Cost: with ``loss="kl"``, two forward passes on 8 examples to choose, and one on all of them.
    """
    if reference not in get_args(Reference):
        raise ValueError(f'reference="{reference}": expected one of "auto", "base", "start"')
    peft = check_adapters(model)
    # Virtual tokens stand before the padding, which would then part them from the prompt.
    size = 1 if peft.active_peft_config.is_prompt_learning else 16
    if loss == "nll":
        return SafetyProbe(model, batches, held=held, opening=opening, micro_batch_size=size)
    if reference == "base" and not _keeps_base(peft):
        raise ValueError(
            'reference="base": the base model is not the aligned model, since the adapter\'s '
            'configuration or the training changes it; use "start"'
        )
    base = reference == "base" or (
        reference == "auto" and _keeps_base(peft) and _base_refuses(peft, batches, size)
    )
    logger.info("reference of the alignment loss: the %s model", "base" if base else "present")
    probe = SafetyProbe(
        model,
        batches,
        loss=BaseReferenceKL() if base else ReferenceKL(),
        held=held,
        opening=opening,
        micro_batch_size=size,
    )
    if not base:
        probe.value([0])  # the first use keeps the reference
    return probe


def check_adapters(model: nn.Module) -> PeftModel:
    """Refuse adapters that cannot be protected.

    Returns:
        The PEFT model itself.

    Raises:
        TypeError: if ``model`` is no PEFT model, or its kind of adapter cannot be protected.
        ValueError: if an adapter is merged into the base model, or nothing trains.
    """
    peft = _peft_model(model)
    for name in peft.active_adapters:
        kind = str(getattr(peft.peft_config[name].peft_type, "value", ""))
        if kind in _REFUSED:
            raise TypeError(f'model: adapter "{name}" is {kind}: {_REFUSED[kind]}')
    merged = [m for m in peft.modules() if isinstance(m, BaseTunerLayer) and m.merged]
    if merged:
        raise ValueError(
            f"model: adapters are merged into {len(merged)} layers, where they do not train; call "
            "model.unmerge_adapter() first"
        )
    if not any(p.requires_grad for p in peft.parameters()):
        raise ValueError(
            f"model: no parameter of the active adapter {peft.active_adapters} trains; load it "
            "with is_trainable=True, or call model.set_adapter"
        )
    return peft


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to the optimizer: those of the active adapters that train.

    Raises:
        TypeError: if ``model`` is no PEFT model, or its kind of adapter cannot be protected.
        ValueError: if an adapter is merged, or nothing trains.
    """
    return [p for p in check_adapters(model).parameters() if p.requires_grad]


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The base model inside; PEFT's own context manager unfreezes active adapters on its way out.

    Args:
        model: the model with its adapters.
    """
    with trainability_kept(model), model.disable_adapter():
        yield


def _peft_model(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model={type(model).__name__}: expected a PEFT model (peft.get_peft_model); for "
            "others use safeopt.SafetyProbe"
        )
    return model


def _keeps_base(model: PeftModel) -> bool:
    """Whether the model with its adapters off is the one before they were added, and stays it."""
    configs = [model.peft_config[name] for name in model.active_adapters]
    # An adapter's parameters bear its name; what trains without one is the base model's own.
    names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    if any(model.peft_config.keys().isdisjoint(parts) for parts in names):
        return False
    return all(
        getattr(config, "init_lora_weights", True) in _LEAVES_BASE
        and getattr(config, "bias", "none") == "none"
        for config in configs
    )


def _base_refuses(model: PeftModel, batches: Sequence[Batch], size: int) -> bool:
    """Whether the base model refuses at least as firmly as the present one."""
    probe = SafetyProbe(model, batches, micro_batch_size=size)
    some = range(min(len(probe), _COMPARED))
    present = probe.value(some)
    with adapters_off(model):
        base = probe.value(some)
    return base <= present * (1 + 1e-4)
