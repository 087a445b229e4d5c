"""Everything that can go wrong before training does so here, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from safeopt.data import ChatExample, collate, encode, read_examples
from safeopt.finetuning.config import ADAMW, FinetuneConfig
from safeopt.losses import IGNORE
from safeopt.models import load_causal_lm
from safeopt.optim import optimizers
from safeopt.probe import SafetyProbe
from safeopt.refusals import generate, is_refusal

REPORT = "run.json"
# Below this share of refusals a model is not aligned in the sense of the probe.
_LEAST_REFUSED = 0.25
# Above this NLL per token the given refusals are not what the model would say.
_HIGHEST_NLL = 2.0


@dataclass
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: its choices.
        model: with its adapter, in training mode.
        tokenizer: its tokenizer.
        rows: encoded training examples.
        probe: the safety examples.
        optimizer: protected unless the config says ``"adamw"``.
        checkpoint: folder to resume from, or None.
        refused: how many of the safety prompts are used, and how many there were.
    """

    config: FinetuneConfig
    model: Any
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    probe: SafetyProbe
    optimizer: torch.optim.Optimizer
    checkpoint: str | None
    refused: tuple[int, int]


def prepare(config: FinetuneConfig) -> Prepared:
    """Read and check everything; write nothing.

    Raises:
        FileNotFoundError: if a file or a checkpoint is missing.
        FileExistsError: if ``out`` holds a run and neither ``resume`` nor ``overwrite`` is set.
        ValueError: if a file is malformed, the model has no chat template, or there is nothing to
            protect since the model does not refuse the safety prompts.
    """
    checkpoint = _checkpoint(config)
    examples = read_examples(config.train)
    safety = read_examples(config.safety, need_response=False)
    harmless = read_examples(config.harmless, need_response=False) if config.harmless else []
    set_seed(config.seed)
    model, tokenizer = load_causal_lm(config.model)
    if torch.cuda.is_available():
        model = model.cuda()
    rows = [encode(tokenizer, example, config.max_length) for example in examples]
    rows = [row for row in rows if any(label != IGNORE for label in row["labels"])]
    if not rows:
        raise ValueError(
            f"max_length={config.max_length}: no response of {config.train} is left; raise it"
        )
    refusals, used = _refusals(model, tokenizer, safety, config)
    if not config.full:
        model = get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha))
    model.train()
    probe = SafetyProbe(
        model,
        _batches(tokenizer, refusals),
        held=_batches(tokenizer, [x.answered(str(refusals[0].response)) for x in harmless]),
    )
    _check_refused(probe, config)
    return Prepared(
        config,
        model,
        tokenizer,
        rows,
        probe,
        _optimizer(model, probe, config),
        checkpoint,
        (used, len(safety)),
    )


def _checkpoint(config: FinetuneConfig) -> str | None:
    out = Path(config.out)
    if config.resume:
        found = get_last_checkpoint(str(out)) if out.is_dir() else None
        if found is None:
            raise FileNotFoundError(
                f"resume: there is no checkpoint in {out}; run without --resume"
            )
        return str(found)
    started = out.is_dir() and ((out / REPORT).exists() or get_last_checkpoint(str(out)))
    if started and not config.overwrite:
        raise FileExistsError(
            f"out={out}: it holds a run already; continue it with --resume, or start again with "
            "--overwrite"
        )
    return None


def _refusals(
    model: Any, tokenizer: Any, safety: list[ChatExample], config: FinetuneConfig
) -> tuple[list[ChatExample], int]:
    """Safety examples with refusals: the given ones, or the model's own where it refuses."""
    given = [example for example in safety if example.response is not None]
    asked = [example for example in safety if example.response is None]
    prompts = [example.prompt[-1]["content"] for example in asked]
    answers = generate(model, tokenizer, prompts, max_new_tokens=32) if asked else []
    own = [
        example.answered(answer)
        for example, answer in zip(asked, answers, strict=True)
        if is_refusal(answer)
    ]
    if len(own) < _LEAST_REFUSED * len(asked):
        raise ValueError(
            f"safety: the model refuses only {len(own)} of the {len(asked)} prompts in "
            f"{config.safety}; there is nothing to protect. Use an aligned model, or prompts that "
            "it refuses"
        )
    return given + own, len(given) + len(own)


def _check_refused(probe: SafetyProbe, config: FinetuneConfig) -> None:
    nll = probe.value(range(min(len(probe), 32)))
    if nll > _HIGHEST_NLL:
        raise ValueError(
            f"safety: the responses in {config.safety} are unlikely under the model "
            f"({nll:.1f} nats a token); it does not refuse like that, so there is nothing to "
            "protect. Leave the responses out to use the model's own refusals"
        )


def _batches(tokenizer: Any, examples: list[ChatExample]) -> list[dict[str, torch.Tensor]]:
    rows = [encode(tokenizer, example) for example in examples]
    return [collate([row], tokenizer.pad_token_id, side="left") for row in rows]


def _optimizer(model: Any, probe: SafetyProbe, config: FinetuneConfig) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    choices: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == ADAMW:
        return torch.optim.AdamW(params, **choices)
    cls: Any = optimizers()[config.optimizer].cls
    return cls(
        params, **choices, probe=probe, rank=config.rank, budget=config.budget, seed=config.seed
    )
