"""The models of the benchmark: aligned SmolLM2, the tiny one, or any other by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import tiny
from benchmarks.config import ALIGNED, TINY, ConfigError, LoraConfig, ModelConfig
from benchmarks.data.sources import CHAT_MODEL, cache_folder, fetch_file
from safeopt.models import load_causal_lm
from safeopt.plan import architectures, load_config

ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m-refusals"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(config: ModelConfig) -> tuple[Any, Any]:
    """The model and tokenizer that a config names, on the GPU where there is one."""
    dtype = DTYPES[config.dtype]
    if config.dry:
        model, tokenizer = stand_in(config), tiny.tokenizer()
    elif config.name == TINY:
        small: Any = tiny.model()  # transformers types `to` as if it were unbound
        model, tokenizer = small.to(dtype), tiny.tokenizer()
    elif config.name == ALIGNED:
        model, tokenizer = aligned_smollm2(dtype)
    else:
        model, tokenizer = load_causal_lm(config.name, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def unaligned(config: ModelConfig) -> Callable[[], Mapping[str, Tensor]] | None:
    """What loads the weights from before the alignment; None if the config knows no such model."""
    if config.dry:
        return lambda: stand_in(config, seed=1).state_dict()
    if config.name == TINY:
        return tiny.unaligned
    if config.name == ALIGNED:
        return lambda: smollm2()[0].state_dict()
    if config.unaligned is None:
        return None
    name = config.unaligned
    return lambda: load_causal_lm(name, dtype=DTYPES[config.dtype])[0].state_dict()


def stand_in(config: ModelConfig, seed: int = 0) -> Any:
    """A tiny model of the config's architecture with random weights, for a dry run.

    It knows the tiny task's words. Layers keep their kinds and the ratios of their heads.

    Raises:
        ConfigError: if the architecture is none that is built in.
    """
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tiny.tokenizer())}
    if config.name in (TINY, ALIGNED):
        whole = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    else:
        if config.architecture is None:
            raise ConfigError(
                f"model {config.name!r}: a dry run needs its architecture; set model.architecture "
                f"to one of {', '.join(architectures())}"
            )
        whole = load_config(config.architecture)
    grouped = whole.num_attention_heads != _key_value_heads(whole)
    changes = {
        **small,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if grouped else 4,
        "num_kv_heads": 2 if grouped else 4,
        "eos_token_id": tiny.tokenizer().eos_token_id,
        "pad_token_id": tiny.tokenizer().pad_token_id,
        "bos_token_id": None,
    }
    known = whole.to_dict()
    layers = whole.num_hidden_layers
    fields = {
        key: value[: small["num_hidden_layers"]]  # a list with an entry for each layer
        if isinstance(value, list) and len(value) == layers
        else changes.get(key, value)
        for key, value in known.items()
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(type(whole).from_dict(fields))
    return model.to(DTYPES[config.dtype]).eval()


def _key_value_heads(config: Any) -> int:
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(config.num_attention_heads)


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
