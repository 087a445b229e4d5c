"""What a chat template writes around an answer, and where the answer's tokens begin.

A template renders a conversation in two ways: up to the point where the assistant begins to answer
(the *generation prompt*), and finished. Some write something between that point and a finished
answer, such as an empty block of thoughts, or end the prompt with an opened block that finished
turns do not have. A `Frame` says what stands around the answer in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from itertools import takewhile
from typing import Any, NamedTuple

# Stands for an answer where only what a template writes around it matters. It begins like one: what
# follows decides how tokenizers divide the white space before it.
ANSWER = "I qanswerq"
# The day that templates write into the prompt: with today's a resumed run would have other tokens.
# It is the one that Llama 3's templates fall back on themselves. Some read ``date_string``, others
# call ``strftime_now``, which can be replaced only from inside the template.
_DAY = date(2024, 7, 26)
_STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{c}', '{_DAY.strftime('%' + c)}')" for c in "YymdjBbAaHIMSpe")
    + " }}{% endmacro %}\n"
)


class Frame(NamedTuple):
    """What a chat template writes around an answer.

    Attributes:
        opened: the conversation up to the answer as the generation prompt has it.
        before: the same as the finished conversation has it.
        after: what follows the answer there.
    """

    opened: str
    before: str
    after: str


def frame_of(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Frame:
    """The frame of an answer to the messages.

    Where the finished conversation does not begin the answer like the generation prompt, not even
    with the same header, it says nothing about answers, and ``before`` is ``opened``.
    """
    opened = render(tokenizer, messages, add_generation_prompt=True)
    finished = render(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}])
    before, found, after = finished.rpartition(ANSWER)
    if found and before.startswith(opened):
        return Frame(opened, before, after)
    # What the generation prompt adds to a conversation that nobody answers is the header.
    header = _shared(opened, render(tokenizer, messages))
    if found and _shared(opened, before) > header:
        return Frame(opened, before, after)
    return Frame(opened, opened, "")


def continued(tokenizer: Any, text: str, at: int) -> tuple[list[int], int]:
    """The token ids of a text whose first part is the generation prompt, and how many are its own.

    These are the ones that a model is given when it is asked, also where the text as a whole has a
    token that reaches over the end of the prompt.
    """
    whole, prompt = token_ids(tokenizer, text), token_ids(tokenizer, text[:at])
    if whole[: len(prompt)] != prompt:
        whole = prompt + token_ids(tokenizer, text[at:])
    return whole, len(prompt)


def divided(tokenizer: Any, text: str, at: int) -> tuple[list[int], int]:
    """The token ids of a text, and how many of them end at a place in it or before.

    A token that reaches over the place, such as a word with the space before it, does not count.
    """
    whole, first = token_ids(tokenizer, text), token_ids(tokenizer, text[:at])
    alike = _shared(whole, first)
    if alike == len(first) or not tokenizer.is_fast:
        return whole, alike
    # The end of the first part is divided otherwise in the whole; only fast tokenizers tell where.
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return whole, sum(end <= at for _, end in offsets["offset_mapping"])


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """With how many equal items two sequences begin."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a rendered text, to which the template has added all special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation, the same on every day.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: dicts with ``role`` and ``content``, oldest first.
        add_generation_prompt: whether the beginning of the assistant's answer follows.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template does not take the
            messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: it has no chat template, so prompts cannot be told from responses; use the "
            "chat version of the model, or set tokenizer.chat_template (--chat-template FILE)"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=_STRFTIME_NOW + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_DAY.strftime("%d %b %Y"),
        )
    # What the expressions of a template, a small program, can end in.
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"chat template: it does not take a conversation of the roles {roles} ({error}); the "
            f"conversation begins {messages[0]['content'][:40]!r}"
        ) from error
    return text
