"""Run what all rows of a batch begin with only once.

A chat template puts the same system message before every prompt. Without gradients its keys and
values can be computed once and used by the whole batch; for short prompts that halves the cost. The
numbers are those of the plain pass up to rounding.
"""

from __future__ import annotations

from itertools import compress, takewhile
from typing import Any

import torch
from torch import nn

from safeopt.losses import IGNORE, Batch, forward_arguments, takes_positions

# A shorter common beginning is not worth a pass of its own.
_WORTHWHILE = 8
_KNOWN = {"input_ids", "attention_mask", "labels"}


@torch.no_grad()
def share_prefix(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch with the same outputs, whose common beginning has already been run.

    Args:
        model: a causal language model in evaluation mode.
        batch: ``input_ids`` and ``attention_mask``, padded on the left, and perhaps ``labels``,
            each ``(m, T)``.

    Returns:
        The rest of the rows, padded on the left, with ``past_key_values`` and ``position_ids``;
        ``attention_mask`` covers the common beginning too. The batch itself where there is nothing
        to share: a short common beginning, a single row, other entries than these, or a model that
        does not attend to all earlier tokens, puts virtual tokens before them or takes no cache.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, width = ids.shape
    shared = _common(batch) if _can_share(model, batch) else 0
    if shared < _WORTHWHILE:
        return dict(batch)
    from transformers import DynamicCache  # models of other libraries do without it

    cache = DynamicCache()
    first = ids[0, width - int(mask[0].sum()) :]
    model(input_ids=first[:shared][None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    rest = int(mask.sum(1).max()) - shared
    # A row's own beginning ends where its padding would reach, counted from the right.
    lengths = mask.sum(1, keepdim=True) - shared
    kept = torch.arange(rest, 0, -1, device=ids.device) <= lengths
    whole = torch.cat([mask.new_ones(rows, shared), kept], dim=1)
    part = {
        "input_ids": ids[:, -rest:],
        "attention_mask": whole,
        "position_ids": (whole.cumsum(-1) - 1)[:, shared:],
        "past_key_values": cache,
    }
    if "labels" in batch:
        part["labels"] = batch["labels"][:, -rest:]
    return part


def tokens_run(batch: Batch, shared: Batch) -> int:
    """Tokens that go through the model for ``shared = share_prefix(model, batch)``."""
    tokens = int(batch["attention_mask"].sum())
    beginning = shared["attention_mask"].shape[1] - shared["input_ids"].shape[1]  # 0 if not shared
    return tokens - (len(batch["input_ids"]) - 1) * beginning


def _common(batch: Batch) -> int:
    """Length of the rows' common beginning, short of the token that predicts the first label."""
    kept = batch["attention_mask"].tolist()

    def without_padding(name: str) -> list[list[int]]:
        # The tensor is read as a whole: a GPU is waited for once.
        return [list(compress(*pair)) for pair in zip(batch[name].tolist(), kept, strict=True)]

    rows = without_padding("input_ids")
    longest = min(len(row) for row in rows) - 1
    if "labels" in batch:
        labels = without_padding("labels")
        unlabelled = (len(list(takewhile(lambda x: x == IGNORE, row))) for row in labels)
        longest = min(unlabelled) - 1
    first, last = min(rows), max(rows)  # what these two share, all rows in between share
    pairs = zip(first[: max(longest, 0)], last, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _can_share(model: nn.Module, batch: Batch) -> bool:
    accepted = {"past_key_values", "use_cache", "logits_to_keep"}
    config = getattr(model, "config", None)
    if len(batch["input_ids"]) < 2 or not set(batch) <= _KNOWN or config is None:
        return False
    # PEFT's prompt and prefix tuning would put them between the beginning and the rest as well.
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    if hasattr(config, "get_text_config"):  # a model that sees images too keeps it inside
        config = config.get_text_config()
    listed = (getattr(config, name, None) for name in ("layer_types", "attention_layers"))
    kinds = next(filter(None, listed), ["full_attention"])  # GPT-Neo has a name of its own
    everything = (
        set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None
    )
    return everything and accepted <= forward_arguments(model) and takes_positions(model)
