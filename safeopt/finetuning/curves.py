"""The plot of a run: task loss and alignment loss over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def save_curves(report: dict[str, Any], path: Path) -> None:
    """Draw ``curves.png`` from the contents of ``run.json``.

    Args:
        report: what `safeopt.finetuning.run` writes.
        path: the PNG file.
    """
    log = [entry for entry in report["log"] if "loss" in entry]
    measured = report["measurements"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    task, alignment = figure.subplots(2, 1, sharex=True)
    task.plot([e["step"] for e in log], [e["loss"] for e in log], color="#0072B2")
    task.set_ylabel("task loss\n(nats per token)")
    if measured:
        steps = [entry["step"] for entry in measured]
        alignment.plot(
            steps, [m["alignment_loss"] for m in measured], "o-", color="#D55E00", label="measured"
        )
        restored = [m for m in measured if m["restored_to"] is not None]
        alignment.plot(
            [m["step"] for m in restored],
            [m["restored_to"] for m in restored],
            "v",
            color="#009E73",
            label="after restoring",
        )
        budget = report["config"]["budget"] + measured[0]["alignment_loss"]
        alignment.axhline(budget, color="0.5", linestyle="--", label="budget")
        alignment.legend(frameon=False)
    else:
        alignment.text(
            0.5,
            0.5,
            "not measured: plain AdamW",
            ha="center",
            va="center",
            transform=alignment.transAxes,
        )
    alignment.set_ylabel("alignment loss\n(nats per token)")
    alignment.set_xlabel("step")
    for axes in (task, alignment):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
