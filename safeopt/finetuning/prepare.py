"""Everything that can go wrong before training does so here, before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
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
# What a resumed run may change; a checkpoint silently overrules some of the rest.
_FREE_TO_CHANGE = {"out", "resume", "overwrite"}
_FREE_TO_CHANGE |= {"epochs", "max_steps", "save_steps", "logging_steps"}


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
        alignment_loss: of the aligned model, before training.
    """

    config: FinetuneConfig
    model: Any
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    probe: SafetyProbe
    optimizer: torch.optim.Optimizer
    checkpoint: str | None
    refused: tuple[int, int]
    alignment_loss: float


def prepare(config: FinetuneConfig) -> Prepared:
    """Read and check everything; write nothing.

    Raises:
        FileNotFoundError: if a file or a checkpoint is missing.
        FileExistsError: if ``out`` is a file, or holds a run and neither ``resume`` nor
            ``overwrite`` is set.
        ValueError: if a file is malformed, the model has no chat template, or there is nothing to
            protect since the model does not refuse the safety prompts.
    """
    checkpoint = _checkpoint(config)
    examples = read_examples(config.train)
    safety = read_examples(config.safety, need_response=False)
    harmless = read_examples(config.harmless, need_response=False) if config.harmless else []
    set_seed(config.seed)
    model, tokenizer = load_causal_lm(config.model)
    if config.chat_template is not None:
        tokenizer.chat_template = _text(config.chat_template)
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
        model = get_peft_model(model, _lora(model, config))
    model.train()
    probe = SafetyProbe(
        model,
        _batches(tokenizer, refusals),
        held=_batches(tokenizer, [x.answered(str(refusals[0].response)) for x in harmless]),
    )
    return Prepared(
        config,
        model,
        tokenizer,
        rows,
        probe,
        _optimizer(model, probe, config),
        checkpoint,
        (used, len(safety)),
        _aligned_loss(probe, config),
    )


def alignment_loss(probe: SafetyProbe) -> float:
    """The alignment loss on the first 32 safety examples, the same ones whenever it is asked."""
    return probe.value(range(min(len(probe), 32)))


def _checkpoint(config: FinetuneConfig) -> str | None:
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out={out}: it is a file; expected a folder, new or empty")
    if config.resume:
        found = get_last_checkpoint(str(out)) if out.is_dir() else None
        if found is None:
            raise FileNotFoundError(
                f"resume: there is no checkpoint in {out}; run without --resume"
            )
        _check_unchanged(config, out / REPORT)
        return str(found)
    started = out.is_dir() and ((out / REPORT).exists() or get_last_checkpoint(str(out)))
    if started and not config.overwrite:
        raise FileExistsError(
            f"out={out}: it holds a run already; continue it with --resume, or start again with "
            "--overwrite"
        )
    return None


def _check_unchanged(config: FinetuneConfig, report: Path) -> None:
    """Refuse to resume a run with other choices than it was started with."""
    if not report.is_file():
        raise FileNotFoundError(
            f"resume: there is no {report}, which says what was started; start again with "
            "--overwrite"
        )
    before = json.loads(report.read_text(encoding="utf-8"))["config"]
    for name, value in config.as_dict().items():
        was = before.get(name, value)
        # A folder may have moved; what lies in it has kept its name.
        moved = (
            isinstance(was, str) and isinstance(value, str) and Path(was).name == Path(value).name
        )
        if name not in _FREE_TO_CHANGE and value != was and not moved:
            raise ValueError(
                f"resume: the run in {config.out} was started with {name}={was}, now it is "
                f"{value}; give the same, or start again with --overwrite"
            )


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"chat_template={path}: there is no such file")
    return path.read_text(encoding="utf-8")


def _lora(model: Any, config: FinetuneConfig) -> LoraConfig:
    """LoRA where PEFT puts it by default, on all linear layers of models it does not know."""
    known = getattr(model.config, "model_type", None) in KNOWN_TARGETS
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=None if known else "all-linear",
    )


def _refusals(
    model: Any, tokenizer: Any, safety: list[ChatExample], config: FinetuneConfig
) -> tuple[list[ChatExample], int]:
    """Safety examples with refusals: the given ones, or the model's own where it refuses."""
    given = [example for example in safety if example.response is not None]
    asked = [example for example in safety if example.response is None]
    for example in asked:
        if len(example.prompt) > 1:
            raise ValueError(
                f"safety: a conversation of {len(example.prompt)} messages in {config.safety} has "
                "no response; give the refusal, or the user's message alone"
            )
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


def _aligned_loss(probe: SafetyProbe, config: FinetuneConfig) -> float:
    """The alignment loss before training, where there is something to protect."""
    nll = alignment_loss(probe)
    if nll > _HIGHEST_NLL:
        raise ValueError(
            f"safety: the responses in {config.safety} are unlikely under the model "
            f"({nll:.1f} nats a token); it does not refuse like that, so there is nothing to "
            "protect. Leave the responses out to use the model's own refusals"
        )
    return nll


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
