"""Causal language models by name: a folder, a hub name, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_causal_lm(name_or_path: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a local folder, a hub name, or a ``.gguf`` file, which is dequantised.
        dtype: of the parameters.

    Returns:
        The model, in evaluation mode on the CPU, and the tokenizer, which has a padding token.

    Raises:
        FileNotFoundError: if a ``.gguf`` file does not exist.
        ValueError: if there is no such model, neither here nor on the hub.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name_or_path)
    where: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model={name_or_path}: there is no such file")
        name_or_path, where = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **where)
    except OSError as error:
        raise ValueError(
            f"model={name_or_path}: neither a folder with a model here nor one on the hub that can "
            f"be reached ({str(error).splitlines()[0]})"
        ) from error
    if where:
        _forget_quantisation(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _forget_quantisation(model: Any) -> None:
    """The weights of a GGUF file were dequantised; the marker would only forbid saving them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
