"""SafetyProbe: the safety examples, the alignment loss on them, and what it costs to look.

The probe answers three questions about the model as it stands now: the alignment loss A(θ), its
gradient, and the gradients of single examples. It leaves no trace: parameters, gradients, buffers,
random state, train/eval mode and hooks are as before, also when something raises in the middle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeopt.batches import (
    by_length,
    join,
    opened,
    require_distinct,
    require_same_keys,
    require_size,
    require_tokens,
    split,
)
from safeopt.distributed import (
    ENGINE,
    Layout,
    is_sharded,
    local,
    reshard,
    sharded_gradients,
    undivided,
)
from safeopt.factored import FactoredRows
from safeopt.factored_gradients import factored_gradients, in_order
from safeopt.isolation import untouched
from safeopt.losses import (
    IGNORE,
    AlignmentLoss,
    Batch,
    ReferenceKL,
    named_loss,
    reads_padding,
    refusal_nll,
)
from safeopt.passes import PassCounter
from safeopt.per_example import PerExampleGradients, per_example_gradients
from safeopt.prefix import share_prefix, tokens_run
from safeopt.rows import row_dtype
from safeopt.timing import clock

# The opening of a refusal that an optimizer protects, in tokens: between 4 and all tried on
# HarmBench `val`, see docs/optimizers/projected-adamw.md.
OPENING = 4


class SafetyProbe:
    """Safety examples and the alignment loss on them.

    Args:
        model: the model that is fine-tuned. Where several processes train it, the
            ``DistributedDataParallel`` module, or the module given to ``fully_shard``: see
            `safeopt.distributed`. Every rank has all examples.
        batches: safety batches, see `safeopt.losses`; at least one example in all. Padding is
            removed; examples are batched anew, by length, when they are used, and only with others
            of their length for a model that would see the padding, see `safeopt.losses`.
        held: batches of harmless prompts, each with a refusal as its response. Restoring alignment
            keeps the refusal as unlikely there as it was, or rare, so that they are not refused.
            The optimizers use 24 of them at most. Only with ``loss="nll"``.
        loss: ``"nll"`` (refusal negative log-likelihood), ``"kl"`` (KL to the model as it is at the
            first use of the probe) or any function ``(model, batch) -> losses (m,)``. A
            `ReferenceKL` keeps the reference of the examples that it has seen before.
        opening: use only so many tokens of each response, at least 1; None for all of it. What a
            model does with a prompt shows in its first words (Qi et al. 2024, arXiv 2406.05946).
            To protect a model, give `OPENING`: its restoring then tells harmful from harmless
            better, and its passes are shorter.
        micro_batch_size: the largest number of examples in one pass, at least 1.

    Raises:
        TypeError: if ``model`` is not a module, is wrapped by FullyShardedDataParallel (FSDP1) or
            DeepSpeed, or ``loss`` is neither a name nor callable.
        ValueError: if there is no example, an example has no labelled token, tensors of a batch
            disagree in size, or ``loss``, ``opening`` or ``micro_batch_size`` is out of range. With
            ``"nll"`` and ``"kl"`` also if a label is negative and not ``IGNORE``, or the model is
            an encoder with a decoder; with ``"kl"`` if two examples have the same tokens and differ
            in something else.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss: Literal["nll", "kl"] | AlignmentLoss = "nll",
        *,
        held: Sequence[Batch] = (),
        opening: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__}: expected a torch.nn.Module")
        if opening is not None and not (isinstance(opening, int) and opening >= 1):
            raise ValueError(f"opening={opening}: expected a number of tokens, at least 1, or None")
        require_size("micro_batch_size", micro_batch_size)
        self.model, self._group = undivided(model)
        self.opening = opening
        self.micro_batch_size = micro_batch_size
        self.passes = PassCounter()
        self.loss = named_loss(loss)
        if held and self.loss is not refusal_nll:
            raise ValueError(
                'held: harmless prompts are held by the likelihood of their refusal; use loss="nll"'
            )
        safety_examples = split(batches, "batches")
        if not safety_examples:
            raise ValueError("batches: no safety example given; at least one is needed")
        held_examples = split(held, "held")
        self.held_count = len(held_examples)
        if self._is_named:
            require_tokens(safety_examples, "batches")
            require_tokens(held_examples, "held")
        self._examples = safety_examples + held_examples
        if opening is not None:
            self._examples = [opened(example, opening) for example in self._examples]
        require_same_keys(self._examples, "batches, held")
        self._reference_cached = not isinstance(self.loss, ReferenceKL)
        if not self._reference_cached:
            require_distinct(self._examples, 'batches with loss="kl"')
        config = getattr(self.model, "config", None)
        if self._is_named and getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"model={type(self.model).__name__}: it is an encoder with a decoder, and the "
                "refusal would be among what the encoder reads; give a decoder-only model, or a "
                "loss of your own"
            )
        self._looped: set[int] = set()
        self._looped_for: tuple[int, ...] = ()
        self._sharded = False  # during a pass: whether the model is under `fully_shard`
        self._verified = False  # whether `_looped` has been found for factored gradients

    def __len__(self) -> int:
        """Number of safety examples; the held ones follow them, at indices from here on."""
        return len(self._examples) - self.held_count

    @property
    def _is_named(self) -> bool:
        """Whether the loss is one of ours: a mean over the refusal's tokens."""
        return self.loss is refusal_nll or isinstance(self.loss, ReferenceKL)

    @property
    def indices(self) -> range:
        """Indices of all examples, safety examples first, then held ones."""
        return range(len(self._examples))

    def divide(self, group: dist.ProcessGroup | None) -> None:
        """Divide the examples over ranks that each hold the whole model, as for a DDP module.

        For a probe of a module that is wrapped later. From then on all ranks run the probe's
        methods together and work with the same bits, also where a device's kernels do not.

        Args:
            group: the ranks; None for this process alone.
        """
        self._group = group

    def values(self, indices: Sequence[int] | None = None) -> Tensor:
        """Alignment loss of each example, in the order of ``indices``: one forward pass.

        Args:
            indices: which examples; all safety examples by default.

        Returns:
            Shape ``(m,)``, float32 (float64 for a float64 model), detached.
        """
        chosen = self._check(indices)
        with self._untouched(), torch.no_grad():
            layout = self._model_layout()
            mine = [chosen[p] for p in layout.share(len(chosen))]
            values: list[Tensor] = [torch.empty(0, device="cpu")] * len(mine)
            for positions in self._micro_batches(mine):
                losses = self._run([mine[p] for p in positions], backward=False)
                for position, loss in zip(positions, losses, strict=True):
                    values[position] = loss
            return layout.gather(torch.stack(values), len(chosen))

    def value(self, indices: Sequence[int] | None = None) -> float:
        """Alignment loss A(θ), the mean over the examples: one forward pass."""
        return float(self.values(indices).mean())

    def response_tokens(self, indices: Sequence[int]) -> Tensor:
        """Number of refusal tokens of each example, shape ``(m,)``, float64; no pass.

        0 for a loss of the caller's own: it need not be a mean over the refusal's tokens.
        """
        labels = [self._examples[index]["labels"][1:] for index in indices]
        return torch.tensor(
            [int((x != IGNORE).sum()) * self._is_named for x in labels], device="cpu"
        ).double()

    def gradient(
        self, params: Sequence[Tensor], indices: Sequence[int] | None = None
    ) -> tuple[float, list[Tensor]]:
        """Alignment loss and its gradient: one forward and one backward pass.

        Args:
            params: parameters of the model that require a gradient.
            indices: which examples; all safety examples by default.

        Returns:
            A(θ) and ∇A, one tensor for each parameter with its shape and dtype.

        Raises:
            ValueError: if some of ``params`` do not belong to the model.
        """
        self._require_own(params)
        chosen = self._check(indices)
        total = [torch.zeros_like(p) for p in params]
        value = 0.0
        with self._untouched(), torch.enable_grad():
            for positions in self._micro_batches(chosen):
                loss = self._run([chosen[p] for p in positions], backward=True).sum() / len(chosen)
                value += float(loss.detach())
                if any(is_sharded(p) for p in params):
                    parts: Sequence[Tensor | None] = sharded_gradients(loss, params)
                else:
                    parts = torch.autograd.grad(loss, list(params), allow_unused=True)
                for accumulated, part in zip(total, parts, strict=True):
                    if part is not None:
                        accumulated += part
        return value, total

    def per_example(
        self, params: Sequence[Tensor], indices: Sequence[int] | None = None
    ) -> PerExampleGradients:
        """Losses and gradients of single examples: one forward and one backward pass.

        Args:
            params: parameters of the model that require a gradient.
            indices: which examples; all safety examples by default.

        Returns:
            Losses ``(m,)`` and, for each parameter, gradients ``(m, *p.shape)``, in the order of
            ``indices``. Memory: m numbers for each parameter. Of sharded parameters, this process's
            parts.
        """
        chosen = self._check(indices)
        self._prepare_for(params)
        with self._untouched(), torch.enable_grad():
            layout = self.layout(params)
            split = not layout.sharded
            mine = [chosen[p] for p in layout.share(len(chosen))] if split else chosen
            losses = torch.empty(len(mine), device="cpu")
            rows = [local(p).detach() for p in params]
            rows = [p.new_empty((len(mine), *p.shape), dtype=row_dtype(p)) for p in rows]
            for positions in self._micro_batches(mine):
                members = [mine[position] for position in positions]
                part = per_example_gradients(
                    partial(self._run, members, backward=True),
                    [partial(self._run, [member], backward=True) for member in members],
                    self.model,
                    params,
                    self._looped,
                    layout,
                    verify=split or not self._verified,
                )
                losses = losses.to(part.losses)
                losses[positions] = part.losses
                for all_rows, some in zip(rows, part.rows, strict=True):
                    all_rows[positions] = some
            self._verified = True
            if split:
                losses = layout.gather(losses, len(chosen))
                rows = [layout.gather(row, len(chosen)) for row in rows]
        return PerExampleGradients(losses, rows)

    def factored(
        self, params: Sequence[Tensor], indices: Sequence[int] | None = None
    ) -> tuple[Tensor, FactoredRows]:
        """As `per_example`, but linear layers and embeddings keep what their gradients are made of.

        Args:
            params: parameters of the model that require a gradient.
            indices: which examples; all safety examples by default.

        Returns:
            Losses ``(m,)`` and the gradients, in the order of ``indices``. Memory: the layers'
            inputs and output gradients at the examples' tokens, see `safeopt.factored`.
        """
        self.layout(params).require_whole("factored gradients")
        chosen = self._check(indices)
        self._prepare_for(params)
        parts = []
        with self._untouched(), torch.enable_grad():
            for positions in self._micro_batches(chosen):
                members = [chosen[position] for position in positions]
                losses, rows = factored_gradients(
                    partial(self._run, members, backward=True),
                    [partial(self._run, [member], backward=True) for member in members],
                    self.model,
                    params,
                    self._looped,
                    verify=not self._verified,
                )
                self._verified = True
                parts.append((positions, losses, rows))
        return in_order(parts)

    def reference(self) -> list[dict[str, Tensor]] | None:
        """What a checkpoint must carry of the reference model, see `restore_reference`.

        Returns:
            The cached log-probabilities of each example for ``loss="kl"``; None for other losses
            and before the probe's first use.
        """
        if isinstance(self.loss, ReferenceKL) and self._reference_cached:
            return self.loss.state_dict()
        return None

    def check_reference(self, stored: Sequence[Mapping[str, Tensor]] | None) -> None:
        """Refuse a stored reference that is not one of this probe's examples; changes nothing.

        Raises:
            ValueError: if ``loss="kl"`` and it is malformed, or there is none for some example: the
                model as it is now has been fine-tuned, so it cannot be looked at again.
        """
        if not isinstance(self.loss, ReferenceKL):
            return
        try:
            known = self.loss.examples(() if stored is None else stored)
        except ValueError as error:
            raise ValueError(f"reference: {error}") from error
        needed = {tuple(example["input_ids"].tolist()) for example in self._examples}
        if missing := len(needed - known):
            raise ValueError(
                f"reference: it lacks {missing} of the probe's {len(needed)} examples, and with "
                'loss="kl" the aligned model\'s outputs are needed; build the probe with the '
                "examples of the saved run"
            )

    def restore_reference(self, stored: Sequence[Mapping[str, Tensor]] | None) -> None:
        """Measure against a stored reference model from now on, not against the present one.

        Args:
            stored: what `reference` returned at the time of the checkpoint.

        Raises:
            ValueError: see `check_reference`.
        """
        self.check_reference(stored)
        if isinstance(self.loss, ReferenceKL) and stored is not None:
            self.loss.load_state_dict(stored)
            self._reference_cached = True

    def layout(self, params: Sequence[Tensor]) -> Layout:
        """How parameters lie over the processes.

        Args:
            params: parameters of the model.

        Raises:
            ValueError: if some of them do not belong to the model.
            TypeError: if they are sharded in a way that is not supported.
        """
        self._require_own(params)
        return Layout.of(params, self._group)

    def _require_own(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that are not the model's: its loss does not depend on them."""
        reshard(self.model)
        own = {id(p) for p in self.model.parameters()}
        foreign = sum(id(p) not in own for p in params)
        if foreign:
            raise ValueError(
                f"params: {foreign} of {len(params)} parameters do not belong to the probe's "
                "model; give the probe the model that is trained"
                + (f". {ENGINE}" if "deepspeed" in sys.modules else "")
            )

    def _model_layout(self) -> Layout:
        """As `layout`, of one parameter for all."""
        params = list(self.model.parameters())
        return Layout.of([next(filter(is_sharded, params), params[0])], self._group)

    def _prepare_for(self, params: Sequence[Tensor]) -> None:
        """Forget which parameters need the loop over examples if these are others than before."""
        if self._looped_for != tuple(id(p) for p in params):
            self._looped, self._looped_for = set(), tuple(id(p) for p in params)
            self._verified = False

    def _check(self, indices: Sequence[int] | None) -> list[int]:
        chosen = list(range(len(self)) if indices is None else indices)
        if not chosen:
            raise ValueError("indices: empty; name at least one safety example")
        last = len(self._examples) - 1
        if min(chosen) < 0 or max(chosen) > last:
            raise IndexError(f"indices={chosen}: the probe has examples 0 to {last}")
        if not self._reference_cached:
            self._cache_reference()
        return chosen

    def _micro_batches(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        """Positions in ``chosen``, grouped by length so that padding is short."""
        lengths = [len(self._examples[index]["input_ids"]) for index in chosen]
        pad = not reads_padding(self.model)
        for group in by_length(lengths, self.micro_batch_size, pad=pad):
            # Layers that put tokens before examples would look to `per_example` like any others.
            # Without the shortest there is one example less than the longest has tokens.
            square = len(group) == lengths[group[-1]] > 1
            yield from (sorted(part) for part in (group[:square], group[square:]) if part)

    def _run(self, members: Sequence[int], *, backward: bool) -> Tensor:
        whole = join([self._examples[index] for index in members], _device(self.model))
        batch: dict[str, Tensor] = whole
        # Sharing a beginning takes a pass of its own, and passes of a sharded model are run by all
        # ranks together, whatever their examples.
        if self.loss is refusal_nll and not backward and not self._sharded:
            batch = share_prefix(self.model, whole)
        self.passes.count(tokens_run(whole, batch), backward=backward)
        losses = self.loss(self.model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (len(members),):
            shape = getattr(losses, "shape", None)
            found = type(losses).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"loss: returned {found} for {len(members)} examples; "
                f"expected one value per example, a tensor of shape ({len(members)},)"
            )
        if backward and not losses.requires_grad:
            raise ValueError(
                "loss: its values have no gradient: it works without grad mode or detaches them, "
                "or no parameter of the model requires a gradient"
            )
        return losses

    def _cache_reference(self) -> None:
        assert isinstance(self.loss, ReferenceKL)
        # What the caller, or another probe, has cached is the reference that they want.
        new = [i for i in self.indices if not self.loss.knows(self._examples[i]["input_ids"])]
        with self._untouched(), torch.no_grad():
            for positions in self._micro_batches(new):
                examples = [self._examples[new[position]] for position in positions]
                batch = join(examples, _device(self.model))
                self.loss.cache(self.model, batch)
                self.passes.count(int(batch["attention_mask"].sum()), backward=False)
        self._reference_cached = True

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Evaluation mode inside; everything as before outside, and the time counted."""
        start = clock()
        reshard(self.model)
        gradients = [(p, p.grad) for p in self.model.parameters() if is_sharded(p)]
        self._sharded = bool(gradients)
        for p, _ in gradients:  # `fully_shard` adds to the gradients that are there, in place
            p.grad = None
        try:
            with untouched(self.model, checkpointing=False):
                yield
        finally:
            reshard(self.model)
            for p, gradient in gradients:
                p.grad = gradient
            self.passes.seconds += clock() - start


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
