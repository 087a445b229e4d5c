"""Python blocks of Markdown pages, and the small world that they run in.

A page is a sequence of fenced blocks that share one namespace:

- ```` ```python ```` is executed;
- ```` ```python skip="why" ```` is not, and says why: it needs a GPU, a network, or the like;
- ```` ```diff ```` of a Python script is executed twice, as it was and as it is.

The world: a folder ``aligned-model`` (a tiny Llama, its tokenizer) and the files ``train.jsonl``,
``pairs.jsonl``, ``prompts.jsonl`` and ``harmless.jsonl`` in the working directory; the names of
`world`; and ``Trainer(..., x=y)``, where ``...`` stands for a model, arguments and a data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama, tiny_tokenizer, with_lora

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)$")
_SKIP = re.compile(r'skip="(?P<why>[^"]*)"')
HARMFUL = [f"w{i} w{i + 1} w{i + 2}" for i in range(4, 16)]
HARMLESS = [f"w{i} w{i + 2}" for i in range(20, 33)]  # more than refusals are given
REFUSAL = "w30 w31 w32"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file.
        line: of its first line of code, from 1.
        info: the words after the fence.
        code: its text.
    """

    page: Path
    line: int
    info: str
    code: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info.strip() else ""

    @property
    def skipped(self) -> str | None:
        """Why the block is not executed, None if it is."""
        found = _SKIP.search(self.info)
        return None if found is None else found["why"]

    def run(self, names: dict[str, Any], code: str | None = None) -> None:
        """Execute the block, or ``code`` in its place; a traceback shows the page's own lines."""
        source = "\n" * (self.line - 1) + (self.code if code is None else code)
        exec(compile(source, str(self.page), "exec"), names)


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    opened: tuple[int, str, str] | None = None
    code: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, code = (number, fence["indent"], fence["info"]), []
        elif opened is not None and fence and not fence["info"]:
            yield Block(page, opened[0] + 1, opened[2], "\n".join(code) + "\n")
            opened = None
        elif opened is not None:
            code.append(line.removeprefix(opened[1]))


def versions(diff: str) -> tuple[str, str]:
    """A script before and after a diff that shows all of it."""
    lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before) + "\n", "\n".join(after) + "\n"


def added(diff: str) -> int:
    """Number of lines that a user writes or changes."""
    return sum(line.startswith("+") for line in diff.splitlines())


@cache
def _aligned_state() -> dict[str, torch.Tensor]:
    from safeopt.data import safety_batches

    model = tiny_llama()
    batches = safety_batches(tiny_tokenizer(), HARMFUL, [REFUSAL] * len(HARMFUL))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        for batch in batches:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def aligned_llama() -> torch.nn.Module:
    """A tiny Llama that refuses harmful prompts."""
    model = tiny_llama()
    model.load_state_dict(_aligned_state())
    return model


def write_files(folder: Path) -> None:
    """The model and the data that the pages' scripts read."""
    model, tokenizer = aligned_llama(), tiny_tokenizer()
    model.save_pretrained(folder / "aligned-model")
    tokenizer.save_pretrained(folder / "aligned-model")
    files = {
        "train": conversations(),
        "pairs": preferences(),
        "prompts": [{"prompt": prompt, "response": REFUSAL} for prompt in HARMFUL],
        "harmless": [{"prompt": prompt} for prompt in HARMLESS],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def conversations() -> list[dict[str, Any]]:
    """The task: short questions with short answers."""
    return [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, *_said(f"w{i + 2} w{i + 3}")]}
        for i in range(4, 16)
    ]


def preferences() -> list[dict[str, Any]]:
    """The same answers, preferred to another one."""
    turns = [line["messages"] for line in conversations()]
    return [{"prompt": t[:1], "chosen": t[1:], "rejected": _said("w4 w5")} for t in turns]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def world() -> dict[str, Any]:
    """The names that a page may use without saying where they come from."""
    from safeopt import ProjectedAdamW, SafetyProbe
    from safeopt.data import safety_batches

    model, tokenizer = with_lora(aligned_llama(), random_b=False), tiny_tokenizer()
    ids = torch.arange(6) + 4
    rows = [{"input_ids": ids + i, "labels": ids + i} for i in range(8)]
    batches = safety_batches(tokenizer, HARMFUL, [REFUSAL] * len(HARMFUL))
    probe = SafetyProbe(model, batches)
    return {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "harmful_prompts": HARMFUL,
        "harmless_prompts": HARMLESS,
        "refusals": [REFUSAL] * len(HARMFUL),
        "batches": batches,
        "probe": probe,
        "optimizer": ProjectedAdamW(model.parameters(), lr=2e-4, probe=probe),
        "loader": torch.utils.data.DataLoader(rows, batch_size=4),
        "train_dataset": rows,
        "Trainer": _trainer(model, rows),
    }


def _trainer(model, rows):
    def build(*omitted, **options):
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments("trainer", max_steps=2, report_to="none", use_cpu=True)
        return Trainer(**({"model": model, "args": args, "train_dataset": rows} | options))

    return build
