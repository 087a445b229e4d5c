"""Batches as callers give them, taken apart into single examples and put together anew.

Examples have no padding, so they can be batched by length; a batch of them is padded on the left,
see `safeopt.losses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from safeopt.losses import IGNORE, Batch

Example = dict[str, Tensor]


def split(batches: Sequence[Batch], argument: str) -> list[Example]:
    """The examples of all batches, each without its padding.

    Args:
        batches: ``input_ids`` and ``labels``, perhaps ``attention_mask``, all ``(m, T)``, and other
            tensors with a row for each example.
        argument: the name under which the caller knows them, for errors.

    Raises:
        ValueError: if a batch is no dict of tensors, lacks an entry or has other entries than the
            first one, tensors of a batch disagree in size, or an example has no label.
    """
    examples = [example for batch in batches for example in _examples(batch, argument)]
    require_same_keys(examples, argument)
    return examples


def opened(example: Example, tokens: int) -> Example:
    """An example up to and including its first ``tokens`` response tokens."""
    length = len(example["labels"])
    # The first position of all has nothing before it that could predict it.
    response = 1 + (example["labels"][1:] != IGNORE).nonzero().squeeze(-1)
    end = int(response[:tokens][-1]) + 1
    return {
        name: tensor[:end] if tensor.shape == (length,) else tensor
        for name, tensor in example.items()
    }


def require_size(argument: str, size: int) -> None:
    """Refuse a size of batches that holds no example.

    Raises:
        ValueError: if it is no whole number of at least 1.
    """
    if not (isinstance(size, Integral) and size >= 1):
        raise ValueError(f"{argument}={size!r}: expected a number of examples, at least 1")


def require_same_keys(examples: Sequence[Example], argument: str) -> None:
    """Refuse examples that cannot stand in one batch.

    Raises:
        ValueError: if some have other entries than others.
    """
    keys = {tuple(sorted(example)) for example in examples}
    if len(keys) > 1:
        raise ValueError(
            f"{argument}: batches with different keys, {sorted(keys)}; give all the same"
        )


def require_tokens(examples: Sequence[Example], argument: str) -> None:
    """Refuse labels that are no tokens, which `safeopt.losses` would take for token 0.

    Raises:
        ValueError: if a label is negative and not `IGNORE`.
    """
    for number, example in enumerate(examples):
        labels = example["labels"]
        wrong = labels[(labels < 0) & (labels != IGNORE)]
        if len(wrong):
            raise ValueError(
                f"{argument}: example {number} has the label {wrong[0]}; expected a token, or "
                f"{IGNORE} where nothing counts"
            )


def require_distinct(examples: Sequence[Example], argument: str) -> None:
    """Refuse examples that their tokens do not tell apart.

    Raises:
        ValueError: if two have the same ``input_ids`` and differ in another entry.
    """
    first: dict[tuple[int, ...], int] = {}
    for number, example in enumerate(examples):
        known = first.setdefault(tuple(example["input_ids"].tolist()), number)
        others = [x for x in example if not torch.equal(example[x], examples[known][x])]
        if others:
            raise ValueError(
                f"{argument}: examples {known} and {number} have the same input_ids and other "
                f"{', '.join(others)}; an example is known by its input_ids there"
            )


def by_length(lengths: Sequence[int], size: int, *, pad: bool = True) -> Iterator[list[int]]:
    """The positions of ``lengths``, the shortest first, at most ``size`` at a time.

    Examples of similar length in one pass need little padding; with ``pad=False`` those of one pass
    have one length.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    alike = groupby(order, key=lambda position: 0 if pad else lengths[position])
    for group in [list(members) for _, members in alike]:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def join(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """A left-padded batch of examples."""
    length = max(example["input_ids"].shape[0] for example in examples)
    batch: dict[str, Tensor] = {}
    for name in examples[0]:
        fill = IGNORE if name == "labels" else 0
        columns = []
        for example in examples:
            tensor, missing = example[name], length - example["input_ids"].shape[0]
            if tensor.shape == example["input_ids"].shape:
                tensor = torch.cat([tensor.new_full((missing,), fill), tensor])
            columns.append(tensor)
        batch[name] = torch.stack(columns).to(device)
    lengths = torch.tensor([example["input_ids"].shape[0] for example in examples], device="cpu")
    mask = torch.arange(length, device="cpu") >= (length - lengths).unsqueeze(1)
    batch["attention_mask"] = mask.long().to(device)
    return batch


def _examples(batch: Batch, argument: str) -> list[Example]:
    _check(batch, argument)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    examples = []
    for row in range(ids.shape[0]):
        example = {
            name: tensor[row, mask[row]] if tensor.shape == ids.shape else tensor[row]
            for name, tensor in batch.items()
            if name != "attention_mask"
        }
        if not bool((example["labels"][1:] != IGNORE).any()):
            raise ValueError(
                f"{argument}: example {row} has no response token (all labels are {IGNORE})"
            )
        examples.append(example)
    return examples


def _check(batch: Any, argument: str) -> None:
    """Refuse what is no batch."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{argument}: a batch is {type(batch).__name__}; expected a list of dicts with "
            "input_ids and labels"
        )
    if "input_ids" not in batch or "labels" not in batch:
        raise ValueError(
            f"{argument}: a batch has the keys {sorted(batch)}; input_ids and labels are needed"
        )
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{argument}: {name} is {type(tensor).__name__}; expected a tensor with a row for "
                "each example"
            )
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise ValueError(
            f"{argument}: input_ids has shape {tuple(ids.shape)}; expected (examples, tokens)"
        )
    for name, tensor in batch.items():
        if tensor.shape[:1] != ids.shape[:1]:
            raise ValueError(
                f"{argument}: {name} has {tuple(tensor.shape)} beside input_ids "
                f"{tuple(ids.shape)}; every tensor needs one row for each example"
            )
    for name in ("labels", "attention_mask"):
        if name in batch and batch[name].shape != ids.shape:
            raise ValueError(
                f"{argument}: {name} has shape {tuple(batch[name].shape)}, input_ids "
                f"{tuple(ids.shape)}; they must be equal"
            )
