"""Chat data: JSON lines in, token ids with labels out.

Three forms of a line are understood:

- ``{"prompt": …, "response": …}``; the response may be missing in safety prompts;
- ``{"messages": [{"role": …, "content": …}, …]}``, the last message from the assistant (or, in
  safety prompts, from the user);
- ``{"instruction": …, "input": …, "output": …}``, with ``input`` optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safeopt.losses import IGNORE

_FORMS = "prompt/response, messages, or instruction/input/output"
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatExample:
    """A conversation. With a response, the last message is the assistant's.

    Attributes:
        messages: dicts with ``role`` and ``content``, oldest first.
    """

    messages: tuple[dict[str, str], ...]

    @property
    def response(self) -> str | None:
        """The assistant's last reply, None if the conversation ends with the user."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else None

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages before the response."""
        return self.messages if self.response is None else self.messages[:-1]

    def answered(self, response: str) -> ChatExample:
        """The same prompt with another response."""
        return ChatExample((*self.prompt, {"role": "assistant", "content": response}))


def read_examples(path: str | Path, *, need_response: bool = True) -> list[ChatExample]:
    """Read a file of JSON lines.

    Args:
        path: the file; empty lines are skipped.
        need_response: refuse examples that end with the user's message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no example, or a line is malformed; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected JSON lines ({_FORMS})")
    examples = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    line_object = json.loads(line.decode("utf-8"))
                    examples.append(chat_example(line_object, need_response=need_response))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
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
        if line.get("input"):
            prompt = f"{line['instruction']}\n\n{_text(line, 'input')}"
            messages = ({"role": "user", "content": prompt}, *example.messages[1:])
            example = ChatExample(messages)
    else:
        raise ValueError(f"found the keys {sorted(line)}; expected {_FORMS}")
    if need_response and example.response is None:
        raise ValueError("there is no response to learn from; expected the assistant's at the end")
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
        token.

    Raises:
        ValueError: if the tokenizer has no chat template, the template does not take the
            conversation, or the example has no response.
    """
    if example.response is None:
        raise ValueError("example: the last message must be the assistant's response")
    prompt = prompt_ids(tokenizer, example.prompt)
    whole = _template(tokenizer, example.messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        # Templates that rewrite earlier turns: append the response as plain text.
        whole = prompt + list(tokenizer(example.response, add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            whole.append(tokenizer.eos_token_id)
    elif tokenizer.eos_token_id in whole[len(prompt) :]:
        # Some templates add a line break after the end token, which no model has to predict.
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        whole = whole[:end]
    labels = [IGNORE] * len(prompt) + whole[len(prompt) :]
    return {"input_ids": whole[:max_length], "labels": labels[:max_length]}


def encode_all(
    tokenizer: Any, examples: Sequence[ChatExample], max_length: int
) -> list[dict[str, list[int]]]:
    """Those of the conversations of which some of the response fits, see `encode`."""
    rows = [encode(tokenizer, example, max_length) for example in examples]
    return [row for row in rows if any(label != IGNORE for label in row["labels"])]


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids up to the point where the assistant begins to answer.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    return _template(tokenizer, messages, add_generation_prompt=True)


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
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORE) for row in rows]),
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
        ValueError: if the lists differ in length, or the tokenizer has no chat template.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"responses: {len(responses)} for {len(prompts)} prompts; one for each")
    rows = [
        encode(tokenizer, ChatExample(({"role": "user", "content": prompt},)).answered(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    starts = range(0, len(rows), batch_size)
    return [collate(rows[start : start + batch_size], pad_id, side="left") for start in starts]


def _template(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: it has no chat template, so prompts cannot be told from responses; use the "
            "chat version of the model, or set tokenizer.chat_template (--chat-template FILE)"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"chat template: it does not take a conversation of the roles {roles} ({error}); the "
            f"conversation begins {messages[0]['content'][:40]!r}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _turn(line: dict[str, Any], prompt: str, response: str) -> ChatExample:
    example = ChatExample(({"role": "user", "content": _text(line, prompt)},))
    return example.answered(_text(line, response)) if response in line else example


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


def _text(line: dict[str, Any], key: str) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected a text that is not empty, found {value!r}")
    return value
