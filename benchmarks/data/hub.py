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
            lines = Path(name).read_text(encoding="utf-8").split("\n")
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
        ConfigError: if a column is missing, or no row is left.
    """
    found: dict[str, ChatExample] = {}
    first_error = ""
    for number, row in enumerate(rows, start=1):
        if prompt is None or response is None:
            try:
                example = chat_example({key: cell for key, cell in row.items() if cell is not None})
            except ValueError as error:
                first_error = first_error or (
                    f" (row {number}: {error}; name its columns as task.prompt and task.response)"
                )
                continue
        else:
            if missing := sorted({prompt, response} - set(row)):
                raise ConfigError(
                    f"task.name={name!r}: no column {', '.join(missing)}; the columns are "
                    f"{', '.join(sorted(row))}"
                )
            question, answer = _text(row[prompt]), _text(row[response])
            if not question or not answer:
                continue
            content = f"{instruction}\n\n{question}" if instruction else question
            example = ChatExample(({"role": "user", "content": content},)).answered(answer)
        found.setdefault(repr(example.prompt), example)
    if not found:
        raise ConfigError(
            f"task.name={name!r}: no row has both a prompt and a response{first_error}"
        )
    return list(found.values())


def _text(value: Any) -> str:
    """A cell as text; of several answers (question answering) the first."""
    if isinstance(value, Mapping):
        value = value.get("text", "")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else ""
