"""Chat data: JSON lines in, token ids with labels out.

Three forms of a line are understood:

- ``{"prompt": …, "response": …}``; in safety prompts the response may be missing, null or blank;
- ``{"messages": [{"role": …, "content": …}, …]}``, the last message from the assistant (or, in
  safety prompts, from the user);
- ``{"instruction": …, "input": …, "output": …}``, with ``input`` optional (or null, or blank).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safeopt.batches import require_size
from safeopt.chat_template import ANSWER, continued, divided, frame_of, render, token_ids
from safeopt.losses import IGNORE

_FORMS = "prompt/response, messages, or instruction/input/output"
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatExample:
    """A conversation. With a response, the last message is the assistant's.

    Attributes:
        messages: dicts with ``role`` and ``content``, oldest first.
        finished: whether the response is all of the answer; an answer that was cut off has no end
            to learn.
    """

    messages: tuple[dict[str, str], ...]
    finished: bool = True

    @property
    def response(self) -> str | None:
        """The assistant's last reply, None if the conversation ends with the user."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else None

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages before the response."""
        return self.messages if self.response is None else self.messages[:-1]

    def answered(self, response: str, *, finished: bool = True) -> ChatExample:
        """The same prompt with another response."""
        return ChatExample((*self.prompt, {"role": "assistant", "content": response}), finished)


def read_examples(path: str | Path, *, need_response: bool = True) -> list[ChatExample]:
    """Read a file of JSON lines.

    Args:
        path: the file; empty lines are skipped.
        need_response: refuse examples that end with the user's message.

    Raises:
        FileNotFoundError: if there is no such file, or it is a folder or a pipe.
        ValueError: if it holds no example, or a line is malformed; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        what = "it is no regular file" if file.exists() else "there is no such file"
        raise FileNotFoundError(f"{path}: {what}; expected JSON lines ({_FORMS})")
    examples = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
                if text.strip():
                    examples.append(chat_example(json.loads(text), need_response=need_response))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON ({error.msg}, character {error.pos + 1}); "
                    f"expected one JSON object a line ({_FORMS})"
                ) from None
            except RecursionError:
                raise ValueError(f"{path}:{number}: not valid JSON (nested too deeply)") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: the file is empty; expected JSON lines ({_FORMS})")
    return examples


def chat_example(line: Any, *, need_response: bool = True) -> ChatExample:
    """One row in any of the three forms of the module's docstring.

    Args:
        line: a dict with the form's keys; others are ignored.
        need_response: refuse examples that end with the user's message.

    Raises:
        ValueError: if it has none of the forms, or lacks a response that is needed.
    """
    if not isinstance(line, dict):
        raise ValueError(f"expected a JSON object ({_FORMS}), found {type(line).__name__}")
    if "messages" in line:
        example = ChatExample(_messages(line["messages"]))
    elif "prompt" in line:
        example = _turn(line, "prompt", "response")
    elif "instruction" in line:
        example = _turn(line, "instruction", "output")
        if not _is_missing(line, "input"):
            prompt = f"{line['instruction']}\n\n{_text(line, 'input')}"
            messages = ({"role": "user", "content": prompt}, *example.messages[1:])
            example = ChatExample(messages)
    else:
        raise ValueError(f"found the keys {sorted(line)}; expected {_FORMS}")
    if need_response and example.response is None:
        raise ValueError(
            f"there is no response to learn from, found the keys {sorted(line)}; expected {_FORMS} "
            "with the assistant's at the end"
        )
    return example


def encode(
    tokenizer: Any, example: ChatExample, max_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids of a conversation through the tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        example: a conversation that ends with the assistant's response.
        max_length: cut after this many tokens; None cuts nothing.

    Returns:
        ``input_ids`` and ``labels``; labels are `IGNORE` on everything but the response and its end
        token. What the template writes before the response, such as an empty block of thoughts, is
        not labelled; neither is the end of a response that is not ``finished``.

    Raises:
        ValueError: if the tokenizer has no chat template, the template does not take the
            conversation, or the example has no response.
    """
    if example.response is None:
        raise ValueError("example: the last message must be the assistant's response")
    frame = frame_of(tokenizer, example.prompt)
    text = render(tokenizer, example.messages)
    said = text[len(frame.before) : len(text) - len(frame.after)]
    if said.strip() == example.response.strip() and text == frame.before + said + frame.after:
        kept = text if example.finished else (frame.before + said).rstrip()
        divide = continued if frame.before == frame.opened else divided
        whole, start = divide(tokenizer, kept, len(frame.before))
    else:
        whole, start = _appended(tokenizer, example, text)
    if tokenizer.eos_token_id in whole[start:]:
        # Some templates add a line break after the end token, which no model has to predict.
        whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    labels = [IGNORE] * start + whole[start:]
    return {"input_ids": whole[:max_length], "labels": labels[:max_length]}


def encode_all(
    tokenizer: Any, examples: Sequence[ChatExample], max_length: int | None
) -> list[dict[str, list[int]]]:
    """Those of the conversations of which some of the response fits, see `encode`."""
    rows = [encode(tokenizer, example, max_length) for example in examples]
    return [row for row in rows if any(label != IGNORE for label in row["labels"])]


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids up to the point where the assistant begins to answer.

    Where the template writes a finished answer otherwise than its generation prompt begins one
    (with an empty block of thoughts, or without the opened one), they are those of the finished
    answer, as in `encode`.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template does not take the
            messages.
    """
    frame = frame_of(tokenizer, messages)
    if frame.before.rstrip() == frame.opened.rstrip():
        return token_ids(tokenizer, frame.opened)
    whole, start = divided(tokenizer, frame.before + ANSWER + frame.after, len(frame.before))
    return whole[:start]


def collate(
    rows: Sequence[Mapping[str, Sequence[int]]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Pad encoded examples to one batch.

    Args:
        rows: results of `encode`, at least one.
        pad_id: the token that fills ``input_ids``.
        side: where the padding goes; safety batches need ``"left"``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``(m, T)`` and long.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        missing = [fill] * (length - len(values))
        return [*missing, *values] if side == "left" else [*values, *missing]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows], device="cpu"),
        "attention_mask": torch.tensor(
            [padded([1] * len(row["input_ids"]), 0) for row in rows], device="cpu"
        ),
        "labels": torch.tensor([padded(row["labels"], IGNORE) for row in rows], device="cpu"),
    }


def safety_batches(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16
) -> list[dict[str, Tensor]]:
    """Left-padded safety batches for a `SafetyProbe`.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        prompts: harmful prompts.
        responses: the refusal of each.
        batch_size: examples in a batch, at least 1.

    Raises:
        TypeError: if ``prompts`` or ``responses`` is one text, not a list of them.
        ValueError: if the lists differ in length, one of the texts is empty or none, ``batch_size``
            is out of range, or the tokenizer has no chat template.
    """
    given = {"prompts": prompts, "responses": responses}
    for name, texts in given.items():
        if isinstance(texts, str):
            raise TypeError(f"{name}={texts!r}: expected a list of texts, not one text")
    if len(prompts) != len(responses):
        raise ValueError(f"responses: {len(responses)} for {len(prompts)} prompts; one for each")
    require_size("batch_size", batch_size)
    asked, said = (
        [_checked(text, f"{name}[{place}]") for place, text in enumerate(texts)]
        for name, texts in given.items()
    )
    rows = [
        encode(tokenizer, ChatExample(({"role": "user", "content": prompt},)).answered(response))
        for prompt, response in zip(asked, said, strict=True)
    ]
    pad, starts = pad_id(tokenizer), range(0, len(rows), batch_size)
    return [collate(rows[start : start + batch_size], pad, side="left") for start in starts]


def pad_id(tokenizer: Any) -> int:
    """The token to pad with: masked and without a label, so that any does where there is none."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _appended(tokenizer: Any, example: ChatExample, text: str) -> tuple[list[int], int]:
    """The token ids where the response does not stand in the template's text as it is.

    Returns:
        The ids, and how many of them come before the response: all that follows the generation
        prompt where the text begins with it, else the response as plain text after the prompt.
    """
    whole = token_ids(tokenizer, text)
    prompt = token_ids(tokenizer, render(tokenizer, example.prompt, add_generation_prompt=True))
    if example.finished and whole[: len(prompt)] == prompt:
        return whole, len(prompt)
    prompt = prompt_ids(tokenizer, example.prompt)
    whole = prompt + token_ids(tokenizer, str(example.response))
    if example.finished and tokenizer.eos_token_id is not None:
        whole.append(tokenizer.eos_token_id)
    return whole, len(prompt)


def _turn(line: dict[str, Any], prompt: str, response: str) -> ChatExample:
    example = ChatExample(({"role": "user", "content": _text(line, prompt)},))
    return example if _is_missing(line, response) else example.answered(_text(line, response))


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise ValueError("messages: expected a list of objects with role and content")
    messages = tuple({"role": _text(m, "role"), "content": _text(m, "content")} for m in value)
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in _ROLES:
            raise ValueError(f'messages: role="{role}"; expected one of {", ".join(_ROLES)}')
    if "user" not in roles or roles[-1] not in ("user", "assistant"):
        raise ValueError(
            f"messages: found the roles {', '.join(roles)}; expected a user's message, and the "
            "user's or the assistant's as the last"
        )
    return messages


def _is_missing(line: dict[str, Any], key: str) -> bool:
    """Whether a key that may be missing is, or holds null or a blank text."""
    value = line.get(key)
    return value is None or (isinstance(value, str) and not value.strip())


def _text(line: dict[str, Any], key: str) -> str:
    return _checked(line.get(key), key)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a text that is not empty, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: half of a surrogate pair, {value[error.start]!r}, at character "
            f"{error.start + 1}; no tokenizer takes it"
        ) from None
    return value
