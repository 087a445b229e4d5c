"""Alignment losses A(θ): how far a model has moved from its refusals.

Every loss maps ``(model, batch)`` to one value per example, shape ``(m,)`` and dtype float32
(float64 for a float64 model). A safety batch is a dict of tensors whose rows are examples:
``input_ids``, ``attention_mask`` and ``labels``, all ``(m, T)`` and long, padded on the left, with
``labels`` equal to ``IGNORE`` outside the refusal tokens. Left padding lines the refusals up at the
end of the rows, so the logits, the most expensive activation of a small model, are computed there
only. A model that `reads_padding` is refused rows with padding: `SafetyProbe` and the operators of
`safeopt.curvature.operators` give it rows of one length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

IGNORE = -100
Batch = Mapping[str, Tensor]
# Models that take no positions and yet are exact behind padding on the left: Mamba's layers set to
# zero what the mask leaves out, ALiBi sees distances only.
_EXACT = frozenset({"bloom", "falcon_mamba", "mamba", "mamba2", "mpt"})


class AlignmentLoss(Protocol):
    """Anything that maps a model and a safety batch to one loss per example, shape ``(m,)``."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the per-example losses, differentiable with respect to the model's parameters."""
        ...


def refusal_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of the refusal, mean over its tokens, for each example.

    Args:
        model: a causal language model whose output has ``.logits``.
        batch: a safety batch of m examples, see the module's docstring.

    Returns:
        Shape ``(m,)``, in nats per token.

    Raises:
        ValueError: if no label counts, or there is padding and the model `reads_padding`.
    """
    return mean_over_tokens(*token_nll(*response_log_probs(model, batch)))


def token_nll(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each response token.

    Args:
        log_probs: of all tokens at each place, ``(m, T, vocabulary)``, as
            `response_log_probs` gives them.
        targets: the tokens that stand there, ``(m, T)``; ``IGNORE`` outside the response.

    Returns:
        Nats, differentiable, zero outside the response; and where the response is. Both ``(m, T)``.
    """
    mask = targets != IGNORE
    nll = -log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return nll * mask, mask


class ReferenceKL:
    """KL(π_θ₀ ‖ π_θ) on the refusal tokens against a cached reference model.

    The reference is the model as it is when `cache` runs. For each refusal token its ``top_k``
    largest log-probabilities are kept, and all others as one remainder class: by the
    data-processing inequality the result is a lower bound of the full KL, zero exactly at θ₀, with
    the memory of ``top_k + 1`` numbers a token instead of the vocabulary.

    Args:
        top_k: number of vocabulary entries kept for each token, at least 1.

    Raises:
        ValueError: if ``top_k`` is smaller than 1.
    """

    def __init__(self, top_k: int = 32) -> None:
        if top_k < 1:
            raise ValueError(
                f"top_k={top_k}: keep at least one log-probability a token (top_k >= 1)"
            )
        self.top_k = top_k
        self._reference: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def cache(self, model: nn.Module, batch: Batch) -> None:
        """Store the reference log-probabilities of a batch: one forward pass."""
        log_probs, targets = response_log_probs(model, batch)
        top, index = log_probs.topk(min(self.top_k, log_probs.shape[-1] - 1), dim=-1)
        for row, key in enumerate(_keys(batch)):
            kept = targets[row] != IGNORE
            self._reference[key] = (top[row, kept].clone(), index[row, kept].clone())

    def knows(self, input_ids: Tensor) -> bool:
        """Whether the reference of an example is cached, by its tokens ``(T,)`` without padding."""
        return tuple(input_ids.tolist()) in self._reference

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The cached reference of each example, as plain tensors on their devices."""
        return [
            {
                "input_ids": torch.tensor(key, device="cpu"),
                "log_probs": top.clone(),
                "tokens": index.clone(),
            }
            for key, (top, index) in self._reference.items()
        ]

    @staticmethod
    def examples(state: Sequence[Mapping[str, Tensor]]) -> set[tuple[int, ...]]:
        """The examples whose reference a state holds, each by its tokens.

        Raises:
            ValueError: if it is not what `state_dict` returned.
        """
        if not (isinstance(state, Sequence) and all(_is_reference(entry) for entry in state)):
            raise ValueError(
                "expected a list with input_ids, log_probs and tokens of each example, as tensors"
            )
        return {tuple(entry["input_ids"].tolist()) for entry in state}

    def load_state_dict(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Put what `state_dict` returned in the place of the cached reference."""
        self._reference = {
            tuple(entry["input_ids"].tolist()): (entry["log_probs"], entry["tokens"])
            for entry in state
        }

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return KL(π_θ₀ ‖ π_θ), mean over the refusal tokens, in nats; shape ``(m,)``.

        Raises:
            KeyError: if an example was not given to `cache` before.
            ValueError: if it was, with another number of labelled tokens; see also `refusal_nll`.
        """
        log_probs, targets = response_log_probs(model, batch)
        losses = []
        for row, key in enumerate(_keys(batch)):
            if key not in self._reference:
                raise KeyError(
                    "this safety example has no cached reference: call cache() with it first"
                )
            top, index = (x.to(log_probs.device) for x in self._reference[key])
            current = log_probs[row, targets[row] != IGNORE]
            if len(current) != len(index):
                raise ValueError(
                    f"labels: {len(current)} tokens count of an example whose reference was cached "
                    f"with {len(index)}; give it the same labels, or cache it again"
                )
            current = current.gather(-1, index)
            p, rest, rest_now = top.exp(), _log_remainder(top), _log_remainder(current)
            kl = (p * (top - current)).sum(-1) + rest.exp() * (rest - rest_now)
            losses.append(kl.sum() / max(len(kl), 1))  # 0 where no token counts
        return torch.stack(losses)


def named_loss(loss: str | AlignmentLoss) -> AlignmentLoss:
    """The loss of a name, ``"nll"`` or ``"kl"``; a function is taken as it is.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if it is neither a name nor callable.
    """
    if loss == "nll":
        return refusal_nll
    if loss == "kl":
        return ReferenceKL()
    if isinstance(loss, str):
        raise ValueError(
            f'loss="{loss}": expected "nll", "kl" or a function (model, batch) -> (m,)'
        )
    if not callable(loss):
        raise TypeError(f'loss={loss!r}: expected "nll", "kl" or a function (model, batch) -> (m,)')
    return loss


def response_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the positions that predict the responses, and the tokens they predict.

    Returns:
        ``(log_probs, targets)`` of shapes ``(m, L, V)`` and ``(m, L)``, where L is the longest
        response of the batch; ``targets`` is ``IGNORE`` where a row has no response token.

    Raises:
        ValueError: see `refusal_nll`.
    """
    labels = batch["labels"]
    length = labels.shape[1]
    # The first token of a row is predicted by nothing, so it never counts.
    labelled = (labels[:, 1:] != IGNORE).any(0).nonzero()
    if labelled.numel() == 0:
        raise ValueError(f"labels: every entry is {IGNORE}; a safety batch needs refusal tokens")
    keep = length - 1 - int(labelled[0])
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    accepted = forward_arguments(model)
    mask = batch.get("attention_mask")
    if mask is not None and reads_padding(model) and not bool(mask.all()):
        lengths = mask.sum(-1)
        raise ValueError(
            f"attention_mask: rows of {int(lengths.min())} to {int(lengths.max())} tokens in "
            f"{length}, and {type(_unwrapped(model)).__name__} may take padding for tokens; give "
            "it rows of one length, without padding, as SafetyProbe does"
        )
    if mask is not None and "position_ids" not in inputs and takes_positions(model):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep + 1
    logits = model(**inputs).logits[:, -(keep + 1) : -1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = labels[:, -keep:]
    if mask is not None:  # a short row's first token follows padding: it does not count either
        targets = targets.masked_fill(mask[:, -(keep + 1) : -1] == 0, IGNORE)
    # A model whose layers lie on several devices may leave its logits on another one.
    return logits.to(dtype).log_softmax(-1), targets.to(logits.device)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row of ``values (m, L)`` over the tokens where ``mask`` is true."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def forward_arguments(model: Any) -> frozenset[str]:
    """Names that the model's forward accepts, behind PEFT, data-parallel and compiled modules."""
    return frozenset(inspect.signature(_unwrapped(model).forward).parameters)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told that the first token behind padding has position 0.

    RoBERTa and its kin take ``position_ids`` too, but count from their padding token's id on.
    """
    return "position_ids" in forward_arguments(model) and not any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in _outside_layers(model)
    )


def reads_padding(model: nn.Module) -> bool:
    """Whether a model may give a row other outputs behind padding on the left than alone.

    One that takes positions does not, but for RecurrentGemma, whose convolutions know no mask. Of
    the others some count padding as positions (BART's decoder) or read it (RWKV), some do not: that
    cannot be seen from outside, so those that were compared are known by name (Mamba, BLOOM, MPT).
    A model without a config is the caller's own, and is to leave padding out by ``attention_mask``.
    """
    config = getattr(_unwrapped(model), "config", None)
    if config is None or getattr(config, "model_type", None) in _EXACT:
        return False
    return "recurrent" in (getattr(config, "block_types", None) or ()) or not takes_positions(model)


def trimmed(batch: Batch) -> Batch:
    """A batch without the columns that are padding in all rows, such as a part of a larger batch.

    The models see less of it: some of transformers 4.51 (Bamba) read it where a row is alone.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    columns = mask.bool().any(0)
    if bool(columns.all()) or not bool(columns.any()):
        return batch
    return {name: x[:, columns] if x.shape == mask.shape else x for name, x in batch.items()}


def _unwrapped(model: Any) -> Any:
    """The model inside of PEFT's, data-parallel and compiled modules."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _outside_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside of a model by their own names, without its stacks of layers.

    These hold nearly all of them: thousands, which are not to be looked through at every pass.
    """
    for name, child in module.named_children():
        yield name, child
        if not isinstance(child, nn.ModuleList):
            yield from _outside_layers(child)


def _keys(batch: Batch) -> Sequence[tuple[int, ...]]:
    """An example's identity: its tokens without the padding."""
    mask = batch["attention_mask"].bool()
    return [tuple(row[kept].tolist()) for row, kept in zip(batch["input_ids"], mask, strict=True)]


def _is_reference(entry: Any) -> bool:
    """Whether it is an entry of `ReferenceKL.state_dict`."""
    if not (isinstance(entry, Mapping) and {"input_ids", "log_probs", "tokens"} <= set(entry)):
        return False
    ids, log_probs, tokens = entry["input_ids"], entry["log_probs"], entry["tokens"]
    return (
        all(isinstance(x, Tensor) for x in (ids, log_probs, tokens))
        and (ids.dtype, ids.dim()) == (torch.int64, 1)
        and log_probs.is_floating_point()
        and tokens.dtype == torch.int64
        and (log_probs.dim(), log_probs.shape) == (2, tokens.shape)
    )


def _log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 − Σ exp(log_probs)) over the last axis, kept away from log 0."""
    mass = log_probs.exp().sum(-1)
    return torch.log((1 - mass).clamp(min=torch.finfo(mass.dtype).eps))
