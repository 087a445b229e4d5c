"""Causal language models by name: a folder, a hub name, or a GGUF file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

_LONGEST = 200  # characters of an error: PEFT names every weight that is missing


def load_causal_lm(
    name_or_path: str, dtype: torch.dtype = torch.float32, *, argument: str = "model"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a local folder, a hub name, or a ``.gguf`` file, which is dequantised.
        dtype: of the parameters.
        argument: what gave the name, for errors.

    Returns:
        The model, in evaluation mode on the CPU, and the tokenizer. It pads with its end token
        where it has no token for that, or one that the model does not know.

    Raises:
        FileNotFoundError: if a ``.gguf`` file does not exist.
        ValueError: if there is no such model, neither here nor on the hub, it cannot be loaded, its
            weights are incomplete, or it is no causal language model.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path, given = Path(name_or_path), f"{argument}={name_or_path}"
    where: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{given}: there is no such file")
        where = {"gguf_file": path.name}
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{given}: this folder holds an adapter; merge it into its base model "
            "(peft: merge_and_unload) and give the merged model"
        )
    results = [folder for folder in (path / "adapter", path / "model") if folder.is_dir()]
    if results and not (path / "config.json").exists():
        raise ValueError(f"{given}: this is the folder of a run; give its result, {results[0]}")
    source = str(path.parent) if where else name_or_path
    renamed = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    try:
        config = AutoConfig.from_pretrained(source, **where)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"a model of type {config.model_type} does not continue a text")
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        # By itself it raises for wrong shapes, too, but names them only in its log.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{"dtype" if renamed else "torch_dtype": dtype},
            **where,
        )
        model, found = loaded
        _check_shapes(found["mismatched_keys"])
        _check_complete(model, set(found["missing_keys"]))
    except SafetensorError as error:
        raise damaged_weights(given, error) from error
    except Exception as error:  # a configuration that is wrong can end in any of them
        raise ValueError(
            f"{given}: expected the folder, the hub name or the .gguf file of a causal language "
            f"model ({cause_of(error)})"
        ) from error
    if where:
        _forget_quantisation(model)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= _known_tokens(model):
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def check_readable(model: Any, rows: Iterable[Sequence[int]], given: str, room: int = 0) -> None:
    """Refuse tokens and positions that a model has no embeddings for.

    By itself it would end in an IndexError, and on a GPU in an assertion that ends the process.

    Args:
        model: a causal language model of transformers, with or without adapters.
        rows: token ids of texts.
        given: what they are, for the error.
        room: tokens that will follow each.

    Raises:
        ValueError: if a token is none of the model's, or a text is longer than its table of
            positions.
    """
    known, positions = _known_tokens(model), _positions(model)
    for row in rows:
        highest, length = max(row, default=0), len(row) + room
        if highest >= known:
            raise ValueError(
                f"{given} has the token {highest}, and the model knows tokens below {known} only; "
                "give the tokenizer that belongs to it, or resize its embeddings"
            )
        if positions is not None and length > positions:
            raise ValueError(
                f"{given} takes {length} tokens, and the model has {positions} positions; give a "
                "shorter one, or for training data a smaller max_length"
            )


def check_trainable(model: Any, given: str) -> None:
    """Raise a ValueError for quantised weights, which have no gradients, naming what was given."""
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{given}: its weights are quantised, and only an adapter on them has gradients; "
            "expected the model as it was before"
        )


def _known_tokens(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _positions(model: Any) -> int | None:
    """How many positions a model with a table of them has; computed ones have no end."""
    positions: Any = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    # OPT's table has two rows more.
    found = positions and any(0 <= m.num_embeddings - positions <= 2 for m in tables)
    return int(positions) if found else None


def cause_of(error: Exception) -> str:
    """The first line of a library's error, with the next where it only introduces that."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    first, *others = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    cause = f"{first} {others[0]}" if others and first.endswith(":") else first
    return textwrap.shorten(cause, _LONGEST, placeholder=" …")


def damaged_weights(given: str, error: Exception) -> ValueError:
    """The error for weights that no library can read.

    Args:
        given: the argument and what was given, as ``name=value``.
        error: what the library says.
    """
    return ValueError(
        f"{given}: its weights cannot be read ({error}); a *.safetensors file was cut off, is "
        "damaged, or is only a pointer of Git LFS; fetch it again"
    )


def _check_shapes(mismatched: Iterable[str | tuple[str, Any, Any]]) -> None:
    """Refuse weights that were left out since their shapes are not the configuration's."""
    first = min(mismatched, default=None)
    if isinstance(first, str):  # transformers 4.51
        raise ValueError(f"{first} has another shape than the configuration asks for")
    if first is not None:
        name, given, needed = first
        raise ValueError(
            f"{name} has the shape {tuple(given)}, and the configuration asks for {tuple(needed)}"
        )


def _check_complete(model: Any, missing: set[str]) -> None:
    """Refuse weights that lack some, which would be made up: transformers only logs that."""
    tensors = model.state_dict(keep_vars=True)
    given = {id(x) for name, x in tensors.items() if name not in missing}
    lacking = sorted(name for name, x in tensors.items() if id(x) not in given)  # of tied ones all
    if lacking:
        some = ", ".join(lacking[:2]) + (", …" if len(lacking) > 2 else "")
        raise ValueError(
            f"its weights lack {some}, which would be made up; the files are incomplete or of "
            "another model"
        )


def _forget_quantisation(model: Any) -> None:
    """The weights of a GGUF file were dequantised; the marker would only forbid saving them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
