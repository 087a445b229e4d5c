"""Gram matrix and basis of safety prompts: one pass, a loop, and a plain training pass."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curvature.problem import Bench
from benchmarks.curvature.records import GramRow
from benchmarks.curvature.timing import Stopwatch, Time
from safeopt import SafetyProbe
from safeopt.curvature.solvers import gram
from safeopt.losses import refusal_nll


def measure_gram(bench: Bench) -> tuple[GramRow, dict[str, Any]]:
    """Time the four in turn, a few times over; the means count.

    Returns:
        The row, and the plain pass with logits at the refusals only, which is what a careful user
        would write by hand.
    """
    setting = bench.setting
    batch = bench.safety_batch(setting.gram_examples)
    singles = single_examples(batch)
    with bench.narrow() as (model, params):
        probe = SafetyProbe(model, [batch])

        def one_pass() -> None:
            gram(probe.per_example(params).rows, setting.gram_rank)

        def loop() -> None:
            gram(looped_rows(model, params, singles), setting.gram_rank)

        def plain() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        def careful() -> None:
            refusal_nll(model, batch).mean().backward()
            model.zero_grad()

        functions = {"one_pass": one_pass, "loop": loop, "plain": plain, "careful": careful}
        one_pass()  # the first call finds out what the hooks cannot serve
        times: dict[str, list[Time]] = {name: [] for name in functions}
        for _ in range(setting.repeats):
            for name, function in functions.items():
                clock = Stopwatch()
                function()
                times[name].append(clock.read())
    wall = {name: mean(time.seconds for time in taken) for name, taken in times.items()}
    row = GramRow(
        one_pass_seconds=wall["one_pass"],
        loop_seconds=wall["loop"],
        forward_backward_seconds=wall["plain"],
    )
    return row, {
        "forward_backward_with_logits_at_the_refusals_only_seconds": wall["careful"],
        "processor_seconds": {
            name: mean(time.processor_seconds for time in taken) for name, taken in times.items()
        },
        "tokens": int(batch["attention_mask"].sum()),
        "tokens_with_padding": batch["input_ids"].numel(),
    }


def looped_rows(
    model: nn.Module, params: list[nn.Parameter], singles: list[dict[str, Tensor]]
) -> list[Tensor]:
    """Per-example gradients by a forward and a backward pass for each."""
    found = [torch.autograd.grad(refusal_nll(model, single).sum(), params) for single in singles]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def single_examples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch without their padding."""
    kept = batch["attention_mask"].bool()
    return [
        {name: tensor[row : row + 1, kept[row]] for name, tensor in batch.items()}
        for row in range(len(kept))
    ]
