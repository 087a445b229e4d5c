"""The model, the data and the safety examples that a run starts from, checked.

`safeopt finetune` trains on them, `safeopt diagnose` looks at them: both see the same model.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safeopt.data import collate, encode_all, pad_id, read_examples
from safeopt.files import plain
from safeopt.finetuning.adapter import default_lora
from safeopt.integrations.bitsandbytes import keep_trainable
from safeopt.models import check_readable, check_trainable, load_causal_lm
from safeopt.probe import SafetyProbe
from safeopt.safety_examples import (
    alignment_loss,
    answered_alike,
    as_batches,
    check_batches,
    check_disjoint,
    check_enough,
    check_likely,
    with_refusals,
)


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What a run starts from.

    Args:
        model: folder, hub name or GGUF file of an aligned causal chat model.
        train: JSON lines to learn from.
        safety: JSON lines with harmful prompts; where a line has no response, the model's own
            refusal is taken.
        harmless: JSON lines with harmless prompts that must not be refused; None for none.
        chat_template: file with a Jinja chat template, instead of the tokenizer's own.
        full: train all parameters instead of a LoRA adapter.
        lora_rank: rank of the adapter.
        lora_alpha: scale of the adapter times its rank.
        batch_size: examples in one pass.
        max_length: tokens after which an example is cut.
        seed: of everything random.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    model: str
    train: Path
    safety: Path
    harmless: Path | None = None
    chat_template: Path | None = None
    full: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    batch_size: int = 4
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: expected at least 2 tokens")
        for name in ("lora_rank", "lora_alpha"):
            if self.full and getattr(self, name) != getattr(InputConfig, name):
                raise ValueError(
                    f"full, {name}={getattr(self, name)}: all parameters or an adapter, not both"
                )
        check_seed(self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the choices as plain values; paths become strings."""
        return plain(self)


@dataclass
class Inputs:
    """What `load_inputs` found.

    Attributes:
        model: with its adapter, in training mode.
        tokenizer: its tokenizer.
        rows: encoded training examples; those whose prompts fill ``max_length`` are left out.
        train_given: how many training examples there were.
        probe: the safety examples.
        refused: how many of the safety prompts are used, and how many there were.
        alignment_loss: of the aligned model on the probe's examples, before training.
    """

    model: Any
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    train_given: int
    probe: SafetyProbe
    refused: tuple[int, int]
    alignment_loss: float


def load_inputs(
    config: InputConfig,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    opening: int | None = None,
) -> Inputs:
    """Read and check everything; write nothing.

    Args:
        config: what to read.
        at_least: refused safety prompts that are needed.
        at_most: safety prompts to use, drawn by the seed; None uses all of them.
        opening: how much of the refusals the probe uses, see `SafetyProbe`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if several processes were started, a file is malformed, a prompt is a safety
            prompt and a harmless one, the model has no chat template or cannot read an example, all
            parameters of a quantised model are to be trained, or it does not refuse the safety
            prompts, or too few of them.
    """
    check_one_process()
    from peft import get_peft_model
    from transformers import set_seed

    examples = read_examples(config.train)
    safety = read_examples(config.safety, need_response=False)
    harmless = read_examples(config.harmless, need_response=False) if config.harmless else []
    check_disjoint(safety, harmless)
    if at_most is not None and at_most < len(safety):
        safety = random.Random(config.seed).sample(safety, at_most)
    set_seed(config.seed)
    model, tokenizer = load_causal_lm(config.model)
    if config.full:
        check_trainable(model, f"full, model={config.model}")
    keep_trainable(model)  # before it answers the prompts
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    if torch.cuda.is_available():
        model = model.cuda()
    rows = encode_all(tokenizer, examples, config.max_length)
    if not rows:
        if not encode_all(tokenizer, examples[:1], None):
            raise ValueError(
                f"chat template: it writes nothing of the first response in {config.train}; "
                "expected one that writes every message"
            )
        raise ValueError(
            f"max_length={config.max_length}: no response of {config.train} is left; raise it"
        )
    ids = [row["input_ids"] for row in rows]
    check_readable(model, ids, f"train: an example in {config.train}")
    refusals = with_refusals(model, tokenizer, safety, str(config.safety))
    check_enough(len(refusals), at_least, str(config.safety))
    held = as_batches(tokenizer, answered_alike(harmless, refusals))
    check_batches(model, held, f"harmless: a prompt in {config.harmless} with the refusal")
    if not config.full:
        model = get_peft_model(model, default_lora(model, config.lora_rank, config.lora_alpha))
    model.train()
    batches = as_batches(tokenizer, refusals)
    loss = check_likely(SafetyProbe(model, batches), str(config.safety))
    probe = SafetyProbe(model, batches, held=held, opening=opening)
    if opening is not None:
        loss = alignment_loss(probe)
    used = (len(refusals), len(safety))
    return Inputs(model, tokenizer, rows, len(examples), probe, used, loss)


def task_batches(
    inputs: Inputs, batch_size: int, count: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Training batches of examples drawn by the seed, padded on the left.

    Raises:
        ValueError: if there are too few examples.
    """
    rows = inputs.rows
    if count < 1 or count * batch_size > len(rows):
        raise ValueError(
            f"batches={count}: {count} batches of {batch_size} need {count * batch_size} training "
            f"examples, and there are {len(rows)}; lower the batches or the batch size"
        )
    drawn = random.Random(seed).sample(rows, count * batch_size)
    pad = pad_id(inputs.tokenizer)
    return [
        collate(drawn[start : start + batch_size], pad, side="left")
        for start in range(0, len(drawn), batch_size)
    ]


def read_template(path: Path) -> str:
    """Read a chat template from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text.
    """
    if not path.is_file():
        what = "it is no regular file" if path.exists() else "there is no such file"
        raise FileNotFoundError(f"chat_template={path}: {what}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template={path}: not UTF-8 text ({error.reason})") from None


def check_one_process() -> None:
    """Raise a ValueError if this process is one of several, as of torchrun: each would write."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ValueError(
            f"WORLD_SIZE={size}: the safeopt command runs in one process, and each of these would "
            "write the same files; start it without torchrun or accelerate launch. To train in "
            "several processes, use Trainer and safeopt.integrations.trainer.protect "
            "(docs/how-to/trainer.md)"
        )


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that numpy, which transformers seeds too, does not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected at least 0 and less than 2**32")
