"""Safety examples from files: harmful prompts with refusals, the given ones or the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from safeopt.data import ChatExample, collate, encode, pad_id, prompt_ids, read_examples
from safeopt.models import check_readable
from safeopt.probe import SafetyProbe
from safeopt.refusals import generate, is_refusal

# Below this share of refusals a model is not aligned in the sense of the probe.
_LEAST_REFUSED = 0.25
# Above this NLL per token given refusals are not what the model would say.
_HIGHEST_NLL = 2.0
_LOOKED_AT = 32
# Of the model's own refusals so many tokens are taken.
_OWN_TOKENS = 32


def read_safety_batches(
    model: Any,
    tokenizer: Any,
    safety: str | Path,
    harmless: str | Path | None = None,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Safety batches for a `SafetyProbe` from JSON lines, see `safeopt.data`.

    Args:
        model: the aligned model; it answers the prompts that come without a response.
        tokenizer: its tokenizer, with a chat template.
        safety: harmful prompts.
        harmless: prompts that must not become refused.

    Returns:
        The batches of `SafetyProbe`'s ``batches`` and of its ``held``, one example each.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, the files share a prompt, or the model does not refuse
            the prompts.
    """
    harmful = read_examples(safety, need_response=False)
    held = [] if harmless is None else read_examples(harmless, need_response=False)
    check_disjoint(harmful, held)
    examples = with_refusals(model, tokenizer, harmful, str(safety))
    refused = as_batches(tokenizer, answered_alike(held, examples))
    check_batches(model, refused, f"harmless: a prompt in {harmless} with the refusal")
    return as_batches(tokenizer, examples), refused


def check_disjoint(harmful: Sequence[ChatExample], harmless: Sequence[ChatExample]) -> None:
    """Raise a ValueError for a prompt that is to be refused and not to be refused."""
    prompts = {str(example.prompt) for example in harmful}
    both = [example for example in harmless if str(example.prompt) in prompts]
    if both:
        raise ValueError(
            f"harmless: {len(both)} of {len(harmless)} prompts are safety prompts, too, such as "
            f"{both[0].prompt[-1]['content'][:40]!r}; a prompt is to be refused or it is not, so "
            "leave it in one of the two files"
        )


def answered_alike(
    harmless: Sequence[ChatExample], refusals: Sequence[ChatExample]
) -> list[ChatExample]:
    """The harmless prompts with the first of the refusals, which they must not get."""
    first = refusals[0]
    return [example.answered(str(first.response), finished=first.finished) for example in harmless]


def with_refusals(
    model: Any, tokenizer: Any, examples: Sequence[ChatExample], source: str
) -> list[ChatExample]:
    """The examples with refusals: the given ones, then those that the model refuses by itself.

    Of the model's own refusals the first 32 tokens are taken; a longer one is not ``finished``.

    Args:
        model: the aligned model.
        tokenizer: its tokenizer.
        examples: harmful prompts, with or without a response.
        source: where they come from, for messages.

    Raises:
        ValueError: if the model refuses too few of the prompts without a response, one of them is
            a longer conversation, or the model cannot read an example, see `check_readable`.
    """
    given = [example for example in examples if example.response is not None]
    asked = [example for example in examples if example.response is None]
    for example in asked:
        if len(example.prompt) > 1:
            raise ValueError(
                f"safety: a conversation of {len(example.prompt)} messages in {source} has "
                "no response; give the refusal, or the user's message alone"
            )
    what = f"safety: a prompt in {source} with its refusal"
    check_readable(model, [encode(tokenizer, x)["input_ids"] for x in given], what)
    check_readable(model, [prompt_ids(tokenizer, x.prompt) for x in asked], what, _OWN_TOKENS)
    prompts = [example.prompt[-1]["content"] for example in asked]
    answers = generate(model, tokenizer, prompts, _OWN_TOKENS) if asked else []
    own = [
        example.answered(answer.text, finished=answer.finished)
        for example, answer in zip(asked, answers, strict=True)
        if is_refusal(answer.text)
    ]
    if len(own) < _LEAST_REFUSED * len(asked):
        raise ValueError(
            f"safety: the model refuses only {len(own)} of the {len(asked)} prompts in "
            f"{source}; there is nothing to protect. Use an aligned model, or prompts that "
            "it refuses"
        )
    return given + own


def check_enough(refused: int, least: int, source: str) -> None:
    """Raise a ValueError for fewer refused prompts than are needed, naming where they are from."""
    if refused < least:
        raise ValueError(
            f"safety: refused prompts in {source}: {refused}; at least {least} are needed, so give "
            "more of them"
        )


def alignment_loss(probe: SafetyProbe) -> float:
    """The alignment loss on the first 32 safety examples, the same ones whenever it is asked."""
    return probe.value(range(min(len(probe), _LOOKED_AT)))


def unlikely(nll: float, source: str) -> str | None:
    """What to tell the user if the model would not refuse in the given words.

    Args:
        nll: `alignment_loss` of the aligned model with ``loss="nll"``.
        source: where the refusals come from.

    Returns:
        A sentence; None where the refusals are likely.
    """
    if nll <= _HIGHEST_NLL:
        return None
    return (
        f"safety: the responses in {source} are unlikely under the model ({nll:.1f} nats a token); "
        "it does not refuse like that, so there is nothing to protect"
    )


def check_likely(probe: SafetyProbe, source: str) -> float:
    """The alignment loss before training, where there is something to protect.

    Args:
        probe: of the aligned model, with ``loss="nll"``.
        source: where its refusals come from, for the message.

    Returns:
        `alignment_loss`. Cost: one forward pass on at most 32 examples.

    Raises:
        ValueError: if the refusals are unlikely under the model, see `unlikely`.
    """
    nll = alignment_loss(probe)
    found = unlikely(nll, source)
    if found is not None:
        raise ValueError(f"{found}. Leave the responses out to use the model's own refusals")
    return nll


def as_batches(tokenizer: Any, examples: Sequence[ChatExample]) -> list[dict[str, Tensor]]:
    """One left-padded batch for each example."""
    pad = pad_id(tokenizer)
    return [collate([encode(tokenizer, example)], pad, side="left") for example in examples]


def check_batches(model: Any, batches: Sequence[dict[str, Tensor]], given: str) -> None:
    """`check_readable` for the batches of `as_batches`."""
    check_readable(model, [batch["input_ids"][0].tolist() for batch in batches], given)
