"""What a task is about, beside its loss: how good the model's greedy answers are, from 0 to 1.

Nothing is executed: generated code is compared with the reference as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, str], float]


def final_number(answer: str, reference: str) -> float:
    """1 if the last number of both is the same, as GSM8K is scored."""
    found, wanted = _last_number(answer), _last_number(reference)
    return float(wanted is not None and found == wanted)


def similarity(answer: str, reference: str) -> float:
    """Share of matching characters: 2·matches/(both lengths), Ratcliff and Obershelp."""
    return SequenceMatcher(None, answer.strip(), reference.strip(), autojunk=False).ratio()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F1: the longest common subsequence of words against both lengths (Lin 2004)."""
    found, wanted = _words(answer), _words(reference)
    common = _longest_common(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


# By task; any other task is scored by ROUGE-L.
METRICS: Mapping[str, tuple[str, Metric]] = {
    "gsm8k": ("right final numbers", final_number),
    "codeio": ("text similarity", similarity),
}


def metric_of(task: str) -> tuple[str, Metric]:
    """The name and the function of a task's metric."""
    return METRICS.get(task, ("ROUGE-L", rouge_l))


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
