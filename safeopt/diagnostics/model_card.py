"""The curvature profile as a section of a Hugging Face model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safeopt.files import write_whole

_BEGIN, _END = "<!-- safeopt profile -->", "<!-- end of safeopt profile -->"
# From a mark to the next end, no other mark between: a section whose end is lost is left alone.
_SECTION = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)


def section(profile: dict[str, Any]) -> str:
    """The profile as Markdown, with the marks by which it is found again."""
    run, loss = profile["run"], profile["alignment_loss"]
    before, after, overlap = profile["before"], profile["after"], profile["overlap"]
    task = run["task_loss"]
    rows = [
        ("alignment loss (nats a refusal token)", f"{loss['before']:.4f}", f"{loss['after']:.4f}"),
        ("task loss (first and last batch)", *(f"{x:.3f}" for x in task or ())),
        ("top eigenvalue of the safety curvature", *_pair(before, after, "eigenvalues")),
        (f"curvature outside the top {before['rank']}", *_pair(before, after, "tail")),
        ("effective rank", *_pair(before, after, "effective_rank")),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows if len(row) == 3)
    what = "all parameters" if run["full"] else "a LoRA adapter"
    lines = [
        _BEGIN,
        "## Safety curvature",
        "",
        f"Fine-tuned with `{run['optimizer']}` for {run['steps']} steps ({what}), and profiled by "
        f"`safeopt profile` on {loss['examples']} safety examples.",
        "",
        "| | before | after |",
        "|---|---|---|",
        table,
        "",
        f"{overlap['share']:.2%} of the weights' change lies in the safety subspace of each weight "
        f"(k={overlap['rank']}); a random change of the same singular values would have "
        f"{overlap['share_matched']:.2%}, a random direction {overlap['share_random']:.2%}.",
    ]
    if overlap["energy_kept"] is not None:
        lines.append(
            f"Against the {overlap['alignment_update']}: energy kept "
            f"{overlap['energy_kept']:.2%}, mode overlap {overlap['mode_overlap']:.2%}, by chance "
            f"{overlap['modes_random']:.2%} (r={overlap['modes']}; arXiv 2505.14185)."
        )
    if profile["onset"] is not None:
        onset = profile["onset"]
        low, high = onset["exponent_interval"]
        lines.append(
            f"Onset of the measured rise: exponent {onset['exponent']:.2f} "
            f"({low:.2f} to {high:.2f}); best model: {onset['best']}."
        )
    elif profile["measurements"]:
        lines.append(
            "No onset is fitted to the looks of the run: they are at other prompts each time, or "
            "found no rise."
        )
    lines += ["", "The curvature is the empirical Fisher matrix; see arXiv 2602.15799.", _END]
    return "\n".join(lines)


def update_card(path: Path, profile: dict[str, Any]) -> Path:
    """Put the section into a model card, in the place of an earlier one; the rest stays.

    Args:
        path: the card, ``README.md`` in a model's folder; made if it is not there.
        profile: the profile.

    Returns:
        The path.

    Raises:
        ValueError: if the card is no text.
    """
    library = "transformers" if profile["run"]["full"] else "peft"
    blank = f"---\nlibrary_name: {library}\n---\n"
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else blank
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    new = section(profile)
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: new, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{new}\n" if text.strip() else f"{new}\n"
    return write_whole(path, text)


def _pair(before: dict[str, Any], after: dict[str, Any], key: str) -> tuple[str, str]:
    values = [x[key][0] if isinstance(x[key], list) else x[key] for x in (before, after)]
    return f"{values[0]:.3g}", f"{values[1]:.3g}"
