"""How likely responses are, and greedy answers.

What all rows begin with, such as the chat template's system message, is run once for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from safeopt.batches import by_length
from safeopt.data import collate
from safeopt.losses import IGNORE, response_log_probs, token_nll
from safeopt.prefix import share_prefix

# One encoded example as `safeopt.data.encode` makes it: ``input_ids``, and ``labels`` that are
# ``IGNORE`` outside the response.
Row = dict[str, list[int]]


@torch.no_grad()
def response_nll(
    model: nn.Module, rows: Sequence[Row], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's response.

    Args:
        model: a causal language model in evaluation mode.
        rows: m encoded examples.
        batch_size: rows in one pass.

    Returns:
        The sum over the response tokens of each row in nats, float64, and their number; both
        ``(m,)`` on the CPU.
    """
    sums = torch.zeros(len(rows), dtype=torch.float64)
    counts = torch.zeros(len(rows), dtype=torch.long)
    for members, batch in _batches(model, rows, batch_size):
        nll, mask = token_nll(*response_log_probs(model, share_prefix(model, batch)))
        sums[members] = nll.sum(-1).double().cpu()
        counts[members] = mask.sum(-1).cpu()
    return sums, counts


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    batch_size: int = 32,
) -> list[list[int]]:
    """Greedy continuations of encoded prompts.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids.
        new_tokens: where a continuation is cut off.
        ends: tokens that end one; they are not part of it.
        batch_size: prompts in one pass.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    rows: list[Row] = [{"input_ids": list(p), "labels": [IGNORE] * len(p)} for p in prompts]
    for members, batch in _batches(model, rows, batch_size):
        given = share_prefix(model, batch)
        mask = given["attention_mask"]
        positions = given.get("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        ids, cache = given["input_ids"], given.get("past_key_values")
        columns: list[Tensor] = []
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        while len(columns) < new_tokens and bool(running.any()):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            columns.append(ids)
            running &= ~torch.isin(ids[:, 0], torch.tensor(list(ends), device=ids.device))
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
        for member, tokens in zip(members, torch.cat(columns, 1).tolist(), strict=True):
            answers[member] = list(takewhile(lambda token: token not in ends, tokens))
    return answers


def _batches(
    model: nn.Module, rows: Sequence[Row], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of similar length, padded on the left, and which they are."""
    device = next(model.parameters()).device
    for members in by_length([len(row["input_ids"]) for row in rows], batch_size):
        batch = collate([rows[i] for i in members], pad_id=0, side="left")
        yield members, {name: tensor.to(device) for name, tensor in batch.items()}
