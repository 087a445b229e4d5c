"""The plot of a run: task loss and alignment loss over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save_curves(report: dict[str, Any], path: Path) -> None:
    """Draw ``curves.png`` from the contents of ``run.json``.

    Args:
        report: what `safeopt.finetuning.run` writes.
        path: the PNG file.
    """
    log = [entry for entry in report["log"] if "loss" in entry]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    task, alignment = figure.subplots(2, 1, sharex=True)
    task.plot([e["step"] for e in log], [e["loss"] for e in log], color="#0072B2")
    task.set_ylabel("task loss\n(nats per token)")
    _draw_alignment(alignment, report, log)
    alignment.set_ylabel("alignment loss\n(nats per token)")
    alignment.set_xlabel("step")
    alignment.set_ylim(0, 1.15 * alignment.dataLim.ymax)
    alignment.xaxis.get_major_locator().set_params(integer=True)
    alignment.legend(frameon=False)
    for axes in (task, alignment):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_alignment(axes: Axes, report: dict[str, Any], log: list[dict[str, Any]]) -> None:
    measured = report["measurements"]
    if not measured:
        ends = report["alignment_loss"]
        axes.plot(
            [0, report["steps"]],
            [ends["start"], ends["end"]],
            "o:",
            color="#D55E00",
            label="measured before and after (not protected)",
        )
        return
    predicted = [entry for entry in log if "alignment_predicted" in entry]
    axes.plot(
        [entry["step"] for entry in predicted],
        [entry["alignment_predicted"] for entry in predicted],
        color="0.6",
        label="predicted",
    )
    axes.plot(
        [entry["step"] for entry in measured],
        [entry["alignment_loss"] for entry in measured],
        "o-",
        color="#D55E00",
        label="measured",
    )
    restored = [entry for entry in measured if entry["restored_to"] is not None]
    if restored:
        axes.plot(
            [entry["step"] for entry in restored],
            [entry["restored_to"] for entry in restored],
            "v",
            color="#009E73",
            label="after restoring",
        )
    budget = report["config"]["budget"] + measured[0]["alignment_loss"]
    axes.axhline(budget, color="0.5", linestyle="--", label="first look + budget")
