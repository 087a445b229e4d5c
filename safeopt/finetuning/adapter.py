"""An adapter's folder, put onto the model that it was trained on."""

from __future__ import annotations

import textwrap
import warnings
from typing import Any

from safeopt.models import damaged_weights

_LONGEST = 200  # characters of an error: PEFT names every weight that is missing


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
            f"({_cause(error)}); give the model that it was trained on"
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


def _cause(error: Exception) -> str:
    """The first line of an error, with the next where it only introduces that."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    first, *others = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    cause = f"{first} {others[0]}" if others and first.endswith(":") else first
    return textwrap.shorten(cause, _LONGEST, placeholder=" …")
