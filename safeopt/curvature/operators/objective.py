"""What a curvature operator differentiates: the loss of a micro-batch and its weight.

Every objective is A(θ) = (1/W) Σ_i ℓ_i(θ), summed over all examples i of all batches:

| loss | ℓ_i | W |
|---|---|---|
| ``"nll"`` | mean NLL of the example's labelled tokens (`losses.refusal_nll`) | examples |
| ``"causal_lm"`` | summed NLL of the example's labelled tokens | labelled tokens |
| a function that returns ``(m,)`` | each value | examples |
| a function that returns one number | the number, for a whole batch | batches |

``"causal_lm"`` equals ``model(**batch).loss`` of Hugging Face causal language models on one batch,
and can be split into micro-batches, which a single number cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt.batches import by_length
from safeopt.losses import (
    IGNORE,
    Batch,
    ReferenceKL,
    refusal_nll,
    response_log_probs,
    token_nll,
)

Loss = Literal["nll", "causal_lm"] | Callable[[nn.Module, Any], Tensor]


class Objective:
    """A loss together with the way in which it is averaged.

    Args:
        loss: see the module's docstring.

    Raises:
        ValueError: if ``loss`` is an unknown name.
        TypeError: if ``loss`` is neither a name nor callable.
    """

    def __init__(self, loss: Loss) -> None:
        if isinstance(loss, str) and loss not in ("nll", "causal_lm"):
            raise ValueError(
                f'loss="{loss}": expected "nll", "causal_lm" or a function (model, batch) -> losses'
            )
        if not callable(loss) and not isinstance(loss, str):
            raise TypeError(f"loss={loss!r}: expected a name or (model, batch) -> losses")
        self.loss: Loss = refusal_nll if loss == "nll" else loss

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the loss is a cross-entropy of next tokens, whose GGN has a closed form."""
        return self.loss in ("causal_lm", refusal_nll) or isinstance(self.loss, ReferenceKL)

    def has_targets(self, batch: Any) -> bool:
        """Whether a token counts, so that the loss can be computed; unknown losses always can."""
        return not self.is_cross_entropy or bool(scored_labels(batch).any())

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Return ℓ_i of each example, shape ``(m,)``, or one number for the batch, shape ``()``."""
        if callable(self.loss):
            return self.loss(model, batch)
        nll, _ = token_nll(*response_log_probs(model, batch))
        return nll.sum(-1)

    def weight(self, batch: Any, losses: Tensor) -> float:
        """Return a micro-batch's share of W."""
        if self.loss != "causal_lm":
            return float(losses.numel())
        return float(scored_labels(batch).sum())

    def token_weights(self, targets: Tensor) -> Tensor:
        """Return w_it with Σ_i ℓ_i = Σ_it w_it·NLL_it; shape of ``targets``, float64."""
        mask = (targets != IGNORE).double()
        if self.loss == "causal_lm":
            return mask
        return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def scored_labels(batch: Batch) -> Tensor:
    """Mask, shape of the labels, of the tokens that count: labelled, and predicted by a token."""
    labels = batch["labels"]
    counted = labels != IGNORE
    counted[:, 0] = False
    mask = batch.get("attention_mask")
    if mask is not None:
        counted[:, 1:] &= mask[:, :-1] != 0
    return counted


def micro_batches(
    batches: Iterable[Any], size: int | None, device: torch.device, *, pad: bool = True
) -> Iterator[Any]:
    """Batches on ``device``, cut into micro-batches of at most ``size`` rows.

    A batch that is no mapping of tensors with equally many rows is passed on whole, as is every
    batch when ``size`` is None. With ``pad=False`` the rows of a micro-batch have one length, by
    their ``attention_mask``, and the shortest of a batch come first.
    """
    for batch in batches:
        moved = to_device(batch, device)
        rows = row_count(moved)
        mask = None if pad or rows is None else moved.get("attention_mask")
        if size is None or rows is None or (rows <= size and mask is None):
            yield moved
        elif mask is None:
            for start in range(0, rows, size):
                yield {name: tensor[start : start + size] for name, tensor in moved.items()}
        else:
            for members in by_length(mask.sum(1).tolist(), size, pad=False):
                yield {name: tensor[members] for name, tensor in moved.items()}


def row_count(batch: Any) -> int | None:
    """Number of examples of a batch; None where it cannot be cut into rows."""
    if not isinstance(batch, Mapping) or not batch:
        return None
    counts = {x.shape[0] if isinstance(x, Tensor) and x.dim() else None for x in batch.values()}
    return counts.pop() if len(counts) == 1 else None


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, also inside mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def equal_data(one: Any, other: Any) -> bool:
    """Whether two batches hold equal tensors; what else they hold is not compared."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        missing = (one != one) & (other != other)  # NaN may stand for a target that is not there
        return bool(((one == other) | missing).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal_data(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal_data, one, other))
    return True
