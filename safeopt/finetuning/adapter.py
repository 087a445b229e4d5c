"""An adapter's folder, put onto the model that it was trained on."""

from __future__ import annotations

from typing import Any

from safeopt.models import damaged_weights


def load_adapter(base: Any, folder: str, argument: str, *, trainable: bool = False) -> Any:
    """The model with the adapter on it.

    Args:
        base: the model that the adapter was trained on; it is changed.
        folder: of the adapter.
        argument: what gave the folder, for errors.
        trainable: whether the adapter is to be trained.

    Raises:
        ValueError: if the adapter's weights are damaged, or do not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except SafetensorError as error:
        raise damaged_weights(f"{argument}={folder}", error) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{argument}={folder}: the adapter does not fit the reference, the aligned model "
            f"({_cause(error)}); give the model that it was trained on"
        ) from error


def _cause(error: Exception) -> str:
    """The first line of an error, with the next where it only introduces that."""
    first, *others = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    return f"{first} {others[0]}" if others and first.endswith(":") else first
