"""Any other data set: a file of JSON lines, or one on the hub, as conversations.

Rows that lack a prompt or a response, as real data sets have a few, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.config import ConfigError
from safeopt.data import ChatExample, chat_example


def rows(name: str, subset: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a data set.

    Args:
        name: a file that ends with ``.jsonl``, or ``owner/name`` on the hub.
        subset: of a data set on the hub.
        split: likewise.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    import datasets

    try:
        if name.endswith(".jsonl"):
            # Some editors begin a file with a byte order mark.
            lines = Path(name).read_text(encoding="utf-8-sig").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises errors of many kinds
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConfigError(
            f"task.name={name!r}: it cannot be loaded ({type(error).__name__}: {reason}); "
            "check the name, the subset and the connection to the hub"
        ) from error


def examples(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    *,
    prompt: str | None,
    response: str | None,
    instruction: str = "",
) -> list[ChatExample]:
    """Rows as conversations that end with the assistant's response; a prompt counts once.

    Args:
        rows: the data.
        name: of the data set, for messages.
        prompt: column of the prompts; None for rows of one of `safeopt.data`'s forms.
        response: column of the responses.
        instruction: stands before every prompt of the column, on lines of its own.

    Raises:
        ConfigError: if no row is left, since a column is missing for instance.
    """
    found: dict[str, ChatExample] = {}
    first_error = ""
    for number, row in enumerate(rows, start=1):
        try:
            example = _example(row, prompt, response, instruction)
        except ValueError as error:
            first_error = first_error or f" (row {number}: {error})"
        else:
            found.setdefault(repr(example.prompt), example)
    if not found:
        raise ConfigError(
            f"task.name={name!r}: no row has both a prompt and a response{first_error}"
        )
    return list(found.values())


def _example(row: Any, prompt: str | None, response: str | None, instruction: str) -> ChatExample:
    """One row as a conversation, see `examples`.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    if prompt is None or response is None:
        try:
            return chat_example({key: cell for key, cell in row.items() if cell is not None})
        except ValueError as error:
            raise ValueError(
                f"{error}; name its columns as task.prompt and task.response"
            ) from None
    if missing := sorted({prompt, response} - set(row)):
        raise ValueError(
            f"no column {', '.join(missing)}; the columns are {', '.join(sorted(row))}"
        )
    question = _text(row[prompt])
    content = f"{instruction}\n\n{question}" if instruction and question else question
    return chat_example({"prompt": content, "response": _text(row[response])})


def _text(value: Any) -> str:
    """A cell as text; of several answers (question answering) the first."""
    if isinstance(value, Mapping):
        value = value.get("text", "")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else ""
