"""Evaluation passes that run what all prompts share only once.

A chat template puts the same system message before every prompt. Without gradients its keys and
values can be computed once and reused for a whole batch; for short prompts that halves the cost.
The numbers are those of the plain passes up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from safeopt.losses import IGNORE, response_log_probs


class Row(TypedDict):
    """One encoded example: tokens, and labels that are ``IGNORE`` outside the response."""

    input_ids: list[int]
    labels: list[int]


KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Part:
    """Some rows of a batch, without the shared prefix and padded on the left."""

    members: list[int]
    input_ids: Tensor
    attention_mask: Tensor  # covers the prefix too
    position_ids: Tensor
    cache: DynamicCache


@torch.no_grad()
def response_nll(
    model: nn.Module, rows: Sequence[Row], batch_size: int = 16, share: bool = True
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's response.

    Args:
        model: a causal language model in evaluation mode.
        rows: m encoded examples.
        batch_size: rows in one pass.
        share: whether to run the rows' common beginning only once.

    Returns:
        The sum over the response tokens of each row in nats, float64, and their number; both
        ``(m,)`` on the CPU.
    """
    sums = torch.zeros(len(rows), dtype=torch.float64)
    counts = torch.zeros(len(rows), dtype=torch.long)
    # The first response token is predicted from the token before it, which must not be shared.
    before = min(next(i for i, x in enumerate(row["labels"]) if x != IGNORE) for row in rows)
    for part in _parts(model, [row["input_ids"] for row in rows], batch_size, before - 1, share):
        labels = torch.full_like(part.input_ids, IGNORE)
        for line, member in enumerate(part.members):
            tail = rows[member]["labels"][-int(part.attention_mask[line].sum()) :]
            kept = min(len(tail), labels.shape[1])
            labels[line, -kept:] = torch.tensor(tail[-kept:])
        log_probs, targets = response_log_probs(
            model,
            {
                "input_ids": part.input_ids,
                "attention_mask": part.attention_mask,
                "position_ids": part.position_ids,
                "past_key_values": part.cache,  # type: ignore[dict-item]
                "labels": labels,
            },
        )
        nll = -log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        mask = targets != IGNORE
        sums[part.members] = (nll * mask).sum(-1).double().cpu()
        counts[part.members] = mask.sum(-1).cpu()
    return sums, counts


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    batch_size: int = 32,
    share: bool = True,
) -> list[list[int]]:
    """Greedy continuations of encoded prompts.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids.
        new_tokens: where a continuation is cut off.
        ends: tokens that end one; they are not part of it.
        batch_size: prompts in one pass.
        share: whether to run the prompts' common beginning only once.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    shortest = min(len(prompt) for prompt in prompts)
    for part in _parts(model, prompts, batch_size, shortest - 1, share):
        ids, mask, positions = part.input_ids, part.attention_mask, part.position_ids
        columns: list[Tensor] = []
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        while len(columns) < new_tokens and bool(running.any()):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=part.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            columns.append(ids)
            running &= ~torch.isin(ids[:, 0], torch.tensor(list(ends), device=ids.device))
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
        for member, tokens in zip(part.members, torch.cat(columns, 1).tolist(), strict=True):
            answers[member] = list(takewhile(lambda token: token not in ends, tokens))
    return answers


def _parts(
    model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int, longest: int, share: bool
) -> Iterator[_Part]:
    """The rows in batches of similar length, each with its own copy of the prefix's cache."""
    device = next(model.parameters()).device
    shared = _common(rows, longest) if share and _attends_to_everything(model) else 0
    prefix: KeysValues = []
    if shared:
        ids = torch.tensor([list(rows[0][:shared])], device=device)
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prefix = [(layer.keys, layer.values) for layer in cache.layers]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rests = [list(rows[i][shared:]) for i in members]
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
        padding = torch.tensor([width - len(rest) for rest in rests], device=device)
        mask = (torch.arange(width, device=device) >= padding.unsqueeze(1)).long()
        mask = torch.cat([mask.new_ones(len(members), shared), mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        yield _Part(members, ids, mask, positions, _copies(prefix, len(members)))


def _copies(prefix: KeysValues, copies: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(copies, -1, -1, -1), values.expand(copies, -1, -1, -1), layer)
    return cache


def _common(rows: Sequence[Sequence[int]], longest: int) -> int:
    """Length of the rows' common beginning, at most ``longest``."""
    first, last = min(rows), max(rows)  # what these two share, all rows in between share
    pairs = zip(first[:longest], last, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _attends_to_everything(model: nn.Module) -> bool:
    """Whether every layer keeps all keys: windows and recurrent states are not shared this way."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None
