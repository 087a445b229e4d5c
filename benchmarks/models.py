"""The models of the benchmark: aligned SmolLM2, the tiny one, or any other by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from filelock import FileLock
from torch import nn

from benchmarks import tiny
from benchmarks.config import ALIGNED, TINY, LoraConfig, ModelConfig
from benchmarks.data.sources import CHAT_MODEL, cache_folder, fetch_file
from safeopt.models import load_causal_lm

ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m-refusals"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(config: ModelConfig) -> tuple[Any, Any]:
    """The model and tokenizer that a config names, on the GPU where there is one."""
    dtype = DTYPES[config.dtype]
    if config.name == TINY:
        model, tokenizer = tiny.model().to(dtype), tiny.tokenizer()
    elif config.name == ALIGNED:
        model, tokenizer = aligned_smollm2(dtype)
    else:
        model, tokenizer = load_causal_lm(config.name, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as shipped, which refuses nothing.

    The GGUF file is turned into an ordinary model folder once (15 seconds, 540 MB in the cache).
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{CHAT_MODEL.version}-float32"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                model, tokenizer = load_causal_lm(str(fetch_file(CHAT_MODEL, ".gguf")))
                working = folder.with_suffix(".partial")
                shutil.rmtree(working, ignore_errors=True)
                model.save_pretrained(working)
                tokenizer.save_pretrained(working)
                working.replace(folder)
    return load_causal_lm(str(folder), dtype=dtype)


def aligned_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct that refuses harmful prompts: with `benchmarks.align`'s adapter.

    Raises:
        FileNotFoundError: if the adapter is not there.
    """
    if not (ADAPTER / "adapter_model.safetensors").exists():
        raise FileNotFoundError(
            f"{ADAPTER}: the adapter that makes SmolLM2 refuse is missing; make it with "
            f"`python -m benchmarks align --out {ADAPTER}`"
        )
    model, tokenizer = smollm2(torch.float32)
    merged = peft.PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload()
    return merged.to(dtype), tokenizer


@contextmanager
def trainable(
    model: Any, lora: LoraConfig | None, seed: int
) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    """The model made ready for one run: adapters or all parameters; afterwards it is as before.

    Args:
        model: the starting point, shared by all runs.
        lora: the adapters to train, or None to train every parameter.
        seed: of the adapters' initial values.

    Yields:
        The model in training mode and its trainable parameters.
    """
    torch.manual_seed(seed)
    if lora is None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            yield model.requires_grad_(True).train(), list(model.parameters())
        finally:
            model.load_state_dict(before)
            model.zero_grad()
            model.eval()
        return
    adapters = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules)
    )
    adapted = peft.get_peft_model(model, adapters)
    try:
        yield adapted.train(), [p for p in adapted.parameters() if p.requires_grad]
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config  # PEFT warns about a second adapter otherwise
        model.eval()
