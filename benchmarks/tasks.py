"""What a run trains on and is measured with, equal for all methods: encoded examples, prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import tiny
from benchmarks.config import ConfigError, RunConfig, TaskConfig
from benchmarks.data import datasets, hub
from benchmarks.inference import Row
from safeopt.data import ChatExample, collate, encode
from safeopt.losses import IGNORE, response_log_probs, token_nll

REFUSAL = tiny.REFUSAL
PROMPT_LENGTH = 512

BUILT_IN: Mapping[str, Callable[[], list[tuple[str, str]]]] = {
    "codeio": datasets.codeio,
    "gsm8k": datasets.gsm8k,
    "summaries": datasets.summaries,
    "tiny": tiny.task,
}


@dataclass(frozen=True)
class Material:
    """The examples of one model and task.

    Attributes:
        train: task examples to train on.
        held_out: task examples to measure the task loss on.
        safety: harmful prompts with refusals, for the methods' use.
        harmless_refused: harmless prompts that sound harmful, with refusals, for the methods' use.
        alignment: others, on which the alignment loss is measured.
        harmful: prompts that are answered to measure the refusal rate.
        harmless: prompts that look harmful, to measure over-refusal.
        pad: the padding token.
    """

    train: list[Row]
    held_out: list[Row]
    safety: list[Row]
    harmless_refused: list[Row]
    alignment: list[Row]
    harmful: list[str]
    harmless: list[str]
    pad: int


def material(config: RunConfig, tokenizer: Any) -> Material:
    """Encode everything that a run needs. Which examples are held out does not depend on a seed.

    Raises:
        ConfigError: if the config asks for more examples or prompts than there are.
    """
    source = tiny if config.task.name == "tiny" or config.model.dry else datasets
    splits = source.safety_splits()
    measured = {"val": splits.tune, "test": splits.test}[config.evaluation.split]
    task, wanted = config.task, config.evaluation
    rows = _task_rows(task, tokenizer, dry=config.model.dry)
    measured_rows = task.eval_examples + task.val_examples
    if len(rows) < measured_rows + config.batch_size:
        raise ConfigError(
            f"task: {len(rows)} examples of {task.name} pass the filters, too few for "
            f"eval_examples={task.eval_examples}, val_examples={task.val_examples} and a batch of "
            f"{config.batch_size}; lower min_response_tokens, or turn full_length off"
        )
    on_val = wanted.split == "val" and task.val_examples > 0
    held_out = rows[task.eval_examples : measured_rows] if on_val else rows[: task.eval_examples]
    # The prompts are taken from the front of one shuffled list, so that a smaller number is a part
    # of a larger one.
    measured = random.Random(0).sample(measured, len(measured))
    harmless = source.over_refusal(config.evaluation.split)
    harmless = random.Random(0).sample(harmless, len(harmless))
    return Material(
        train=rows[measured_rows:],
        held_out=held_out,
        safety=[refusal_row(tokenizer, prompt) for prompt in splits.probe],
        harmless_refused=[refusal_row(tokenizer, prompt) for prompt in source.held()],
        alignment=[
            refusal_row(tokenizer, prompt)
            for prompt in _first(measured, wanted.alignment_prompts, "alignment_prompts")
        ],
        harmful=_first(measured, wanted.refusal_prompts, "refusal_prompts"),
        harmless=_first(harmless, wanted.over_refusal_prompts, "over_refusal_prompts"),
        pad=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def refusal_row(tokenizer: Any, prompt: str) -> Row:
    """A prompt with the refusal that an aligned model gives to harmful ones."""
    return encode(tokenizer, _chat(prompt, REFUSAL), PROMPT_LENGTH)


def batches(
    rows: Sequence[Row], batch_size: int, steps: int, seed: int, pad: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The training batches in an order drawn from the seed, every example once in an epoch."""
    rng = random.Random(seed)
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < batch_size:
            waiting = rng.sample(range(len(rows)), len(rows))
        chosen, waiting = waiting[:batch_size], waiting[batch_size:]
        batch = collate([rows[i] for i in chosen], pad, side="left")
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def single_batches(rows: Sequence[Row], seed: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Every row as a batch of its own, in an order drawn from the seed."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    return [
        {name: torch.tensor([row[name]], device=device) for name in ("input_ids", "labels")}
        for row in shuffled
    ]


def task_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The usual fine-tuning loss: mean NLL over all response tokens of the batch, in nats.

    The rows are padded on the left, so logits are computed from the first response token on.
    """
    nll, mask = token_nll(*response_log_probs(model, batch))
    return nll.sum() / mask.sum()


def _task_rows(task: TaskConfig, tokenizer: Any, *, dry: bool) -> list[Row]:
    examples = examples_of(task, dry=dry)
    random.Random(0).shuffle(examples)
    rows = [encode(tokenizer, example, task.max_length) for example in examples]
    return [
        row
        for row in rows
        if sum(label != IGNORE for label in row["labels"]) >= task.min_response_tokens
        and (not task.full_length or len(row["input_ids"]) == task.max_length)
    ]


def examples_of(task: TaskConfig, *, dry: bool = False) -> list[ChatExample]:
    """The task's conversations, in the order of their source.

    Args:
        task: where they come from.
        dry: rows of the tiny task, under the same column names, stand in for the source's.

    Raises:
        ConfigError: if the source cannot be read or its rows have another form.
    """
    if task.name in BUILT_IN:
        pairs = tiny.task() if dry else BUILT_IN[task.name]()
        return [_chat(prompt, response) for prompt, response in pairs]
    rows = _stand_ins(task) if dry else hub.rows(task.name, task.subset, task.split)
    return hub.examples(
        rows, task.name, prompt=task.prompt, response=task.response, instruction=task.instruction
    )


def _stand_ins(task: TaskConfig) -> list[dict[str, Any]]:
    names = (task.prompt or "prompt", task.response or "response")
    return [dict(zip(names, pair, strict=True)) for pair in tiny.task()]


def _chat(prompt: str, response: str) -> ChatExample:
    return ChatExample(({"role": "user", "content": prompt},)).answered(response)


def _first(prompts: list[str], number: int, name: str) -> list[str]:
    if number > len(prompts):
        raise ConfigError(f"evaluation.{name}={number}: there are only {len(prompts)} such prompts")
    return prompts[:number]
