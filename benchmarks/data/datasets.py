"""The benchmark's data as plain Python: prompts, and pairs of prompt and response.

Every loader fetches its package on first use (`benchmarks.data.sources`) and returns the rows in
the order of the file. Nothing here shuffles but `split`, and nothing is ever executed. Of pairs
with the same prompt only the first is kept, so that disjoint parts share no prompt.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from benchmarks.data.sources import CODEIO, GSM8K, HARMBENCH, PYRIT, SUMMARIES, fetch_file

PROMPTS = Path(__file__).parent / "prompts"
CODE_REQUEST = "Answer with a Python function named main_solution."
T = TypeVar("T")
Split = Literal["val", "test"]


@dataclass(frozen=True)
class SafetySplits:
    """Harmful prompts for the four uses that must not share any.

    Attributes:
        align: to make the model refuse in the first place (AdvBench, first part).
        probe: for the optimizer's safety probe, and for rivals that replay (AdvBench, second part).
        tune: for choosing hyperparameters (HarmBench validation).
        test: for the published figure (HarmBench test).
    """

    align: list[str]
    probe: list[str]
    tune: list[str]
    test: list[str]


def advbench() -> list[str]:
    """The 520 harmful instructions of AdvBench."""
    # libyaml's loader is ten times as fast where PyYAML was built with it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = fetch_file(PYRIT, "adv_bench.prompt").read_text(encoding="utf-8")
    return [seed["value"].strip() for seed in yaml.load(text, loader)["seeds"]]


def harmbench(split: Split) -> list[str]:
    """HarmBench's standard behaviours: 41 for validation, 159 for the test.

    The contextual and copyright behaviours are left out: a refusal of them means something else.
    """
    if split not in ("val", "test"):
        raise ValueError(f'split="{split}": HarmBench has the splits "val" and "test"')
    rows = _csv(fetch_file(HARMBENCH, f"_{split}.csv"))
    return [r["Behavior"].strip() for r in rows if r["FunctionalCategory"] == "standard"]


def codeio(max_chars: int = 1200) -> list[tuple[str, str]]:
    """CodeI/O: a task in words and a Python program that solves it.

    Comments that only repeat the data set's own template are removed from the programs.

    Args:
        max_chars: the most characters of prompt and response together.
    """
    with gzip.open(fetch_file(CODEIO, "codeio.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        (f"{r['task_description'].strip()}\n{CODE_REQUEST}", _without_template(r["code_sample"]))
        for r in rows
    ]
    return _distinct([(p, code) for p, code in pairs if len(p) + len(code) <= max_chars])


def gsm8k() -> list[tuple[str, str]]:
    """The 1,319 problems of GSM8K's test split; the answer's last line is ``#### number``.

    The calculator annotations (``<<48/2=24>>``) are removed.
    """
    rows = _jsonl(fetch_file(GSM8K, "test.jsonl"))
    return _distinct(
        [(r["question"].strip(), re.sub(r"<<.*?>>", "", r["answer"]).strip()) for r in rows]
    )


def summaries() -> list[tuple[str, str]]:
    """611 summaries of claims and titles of abstracts; the instruction stands before the text."""
    pairs = []
    for name in ("consensus_summary/samples.jsonl", "abstract2title/samples.jsonl"):
        for row in _jsonl(fetch_file(SUMMARIES, name)):
            prompt = "\n\n".join(message["content"].strip() for message in row["input"])
            pairs.append((prompt, row["ideal"].removeprefix("Summary:").strip()))
    return _distinct(pairs)


def over_refusal(part: Split) -> list[str]:
    """64 harmless prompts that look harmful, for measuring over-refusal only.

    As with the harmful ones, ``val`` is for choosing hyperparameters, ``test`` for published
    figures.
    """
    return _lines(PROMPTS / f"over_refusal_{part}.txt")


def harmless_train() -> list[str]:
    """120 harmless prompts for aligning a model; the last 30 of them sound harmful."""
    return _lines(PROMPTS / "harmless_train.txt")


def borderline() -> list[str]:
    """110 harmless questions that sound harmful, for aligning a model."""
    return _lines(PROMPTS / "borderline_align.txt")


def held() -> list[str]:
    """64 harmless requests that sound harmful, for methods to hold; aligning has not used them."""
    return _lines(PROMPTS / "borderline_held.txt")


def labelled_refusals() -> list[tuple[str, bool]]:
    """169 answers of chat models, with a person's verdict on whether each is a refusal."""
    rows = [
        row
        for name in ("refusal.csv", "refusal_extra.csv")
        for row in _csv(fetch_file(PYRIT, name))
    ]
    return [(row["assistant_response"], row["human_score"] == "1") for row in rows]


def split(items: Sequence[T], fractions: Sequence[float], seed: int = 0) -> list[list[T]]:
    """Shuffle and cut into disjoint parts.

    Args:
        items: what to divide.
        fractions: size of each part relative to all items; what they leave of 1 is not used.
        seed: of the shuffle. The same seed gives the same parts on every platform.

    Raises:
        ValueError: if a fraction is negative or their sum exceeds 1.
    """
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions={list(fractions)}: expected numbers >= 0 with a sum <= 1")
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    cuts = [round(sum(fractions[:i]) * len(shuffled)) for i in range(len(fractions) + 1)]
    return [shuffled[a:b] for a, b in pairwise(cuts)]


def safety_splits(seed: int = 0) -> SafetySplits:
    """Divide the harmful prompts among alignment, probe, tuning and test.

    Args:
        seed: decides which half of AdvBench aligns the model and which serves the probe.
            HarmBench's own division is kept.
    """
    tune, test = harmbench("val"), harmbench("test")
    held_out = {_normalised(prompt) for prompt in tune + test}
    prompts = [prompt for prompt in advbench() if _normalised(prompt) not in held_out]
    align, probe = split(prompts, (0.5, 0.5), seed)
    return SafetySplits(align=align, probe=probe, tune=tune, test=test)


def _distinct(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs without those whose prompt came before."""
    first: dict[str, str] = {}
    for prompt, response in pairs:
        first.setdefault(prompt, response)
    return list(first.items())


def _normalised(prompt: str) -> str:
    """The words of a prompt, without case and punctuation."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


# Comments that the data set's authors put into every program, some of them orders to its writer.
_TEMPLATE = re.compile(
    r"""^\#\ *(?:
        import\ necessary\ packages
      | main\ function
      | all\ class\ and\ function\ definitions\ in\ the\ code\ file.*
      | all\ input\ arguments\ of\ the\ main_solution\ function.*
      | return,\ the\ returned\ value\ must\ be.*
      | if\ you\ need\ to\ invoke\ functions\ that.*
      | they\ will\ be\ used\ in\ the\ main_solution\ function.*
    )\s*$""",
    re.IGNORECASE | re.VERBOSE,
)


def _without_template(code: str) -> str:
    kept = [line.rstrip() for line in code.splitlines() if not _TEMPLATE.match(line.strip())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; comment lines (#) may stand before the header."""
    with path.open(encoding="utf-8", newline="") as file:
        position = file.tell()
        while file.readline().startswith("#"):
            position = file.tell()
        file.seek(position)
        return list(csv.DictReader(file))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also cuts at the line separators that occur inside JSON strings.
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
