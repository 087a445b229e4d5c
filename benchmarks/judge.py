"""How good the refusal judge is, on answers that people have labelled."""

from __future__ import annotations

from collections.abc import Iterable

from safeopt.refusals import is_refusal


def judge_quality(labelled: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Precision and recall of `safeopt.refusals.is_refusal`.

    Some data sets count an answer to another question as a refusal of this one; the same text then
    stands with both labels, and no judge of the text alone can be right about both.

    Args:
        labelled: answers, each with whether it is a refusal.

    Returns:
        ``precision`` (nan if the judge found none), ``recall`` (nan if there is none to find),
        ``n``, the number of answers, and ``recall_consistent``: the recall among the refusals whose
        text does not also stand as something else.
    """
    labelled = list(labelled)
    other = {answer for answer, refused in labelled if not refused}
    consistent = [pair for pair in labelled if not (pair[1] and pair[0] in other)]
    precision, recall = _precision_recall(labelled)
    return {
        "precision": precision,
        "recall": recall,
        "n": len(labelled),
        "recall_consistent": _precision_recall(consistent)[1],
    }


def _precision_recall(labelled: list[tuple[str, bool]]) -> tuple[float, float]:
    verdicts = [(is_refusal(answer), refused) for answer, refused in labelled]
    found = sum(verdict for verdict, _ in verdicts)
    real = sum(refused for _, refused in verdicts)
    hits = sum(verdict and refused for verdict, refused in verdicts)
    return hits / found if found else float("nan"), hits / real if real else float("nan")
