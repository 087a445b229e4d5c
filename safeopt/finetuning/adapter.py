"""Adapters: the one that a run trains, and a folder put onto the model it was trained on."""

from __future__ import annotations

import warnings
from typing import Any

from safeopt.models import cause_of, damaged_weights


def default_lora(model: Any, rank: int, alpha: int) -> Any:
    """LoRA where PEFT puts it by default, on all linear layers of models it does not know.

    Args:
        model: the model that gets the adapter.
        rank: of the adapter.
        alpha: its scale times its rank.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS

    # Named, not left to PEFT: before it looks them up it forgets the default of mixtures of
    # experts, such as Mixtral.
    targets: Any = KNOWN_TARGETS.get(str(model.config.model_type), "all-linear")
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets)


def load_adapter(base: Any, folder: str, argument: str, *, trainable: bool = False) -> Any:
    """The model with the adapter on it, every weight of the one in the other.

    Args:
        base: the model that the adapter was trained on; it is changed.
        folder: of the adapter.
        argument: what gave the folder, for errors.
        trainable: whether the adapter is to be trained.

    Raises:
        ValueError: if the adapter's weights are damaged or incomplete, or do not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            # Parts of the adapter would stay as they are before training.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
        _check_all_used(model, folder, trainable)
    except SafetensorError as error:
        raise damaged_weights(f"{argument}={folder}", error) from error
    except (RuntimeError, ValueError, OSError, KeyError, UserWarning) as error:
        raise ValueError(
            f"{argument}={folder}: the adapter does not fit the reference, the aligned model "
            f"({cause_of(error)}); give the model that it was trained on"
        ) from error
    return model


def _check_all_used(model: Any, folder: str, trainable: bool) -> None:
    """Refuse an adapter of which a part finds no place in the model; PEFT leaves it out."""
    if model.active_peft_config.is_prompt_learning:  # its one weight is no part of the model
        return
    # Only loading by itself says what was left out; a second time it changes nothing.
    found = model.load_adapter(folder, model.active_adapter, is_trainable=trainable)
    if found.unexpected_keys:
        raise ValueError(f"there is no place in it for {min(found.unexpected_keys)}")
