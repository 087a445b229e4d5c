"""The plots of a curvature profile."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from safeopt.diagnostics.layers import LayerShare, block_shares, place
from safeopt.diagnostics.plots import curve_plot


def profile_plots(profile: dict[str, Any], run: dict[str, Any]) -> dict[str, Figure]:
    """All plots by name; those without data are left out.

    Args:
        profile: see `safeopt.diagnostics.profile`.
        run: what ``run.json`` holds.
    """
    before, after = profile["before"], profile["after"]
    figures = {
        "spectrum": curve_plot(
            {
                "after": list(enumerate(after["eigenvalues"], start=1)),
                "before": list(enumerate(before["eigenvalues"], start=1)),
            },
            "index",
            "eigenvalue of the safety curvature",
            logarithmic="y",
        ),
        "layers": curve_plot(
            {"after": _by_block(after), "before": _by_block(before)},
            "transformer block",
            "share of the safety curvature",
        ),
    }
    task = [(entry["step"], entry["loss"]) for entry in run["log"] if "loss" in entry]
    if task:
        figures["task"] = curve_plot({"task loss": task}, "step", "task loss (nats a token)")
    loss, steps = profile["alignment_loss"], profile["run"]["steps"]
    looks = profile["measurements"]
    measured = [(look["step"], look["measured"]) for look in looks]
    ends = [(0, loss["before"]), (steps, loss["after"])]
    curves = {"measured": measured} if measured else {"measured before and after": ends}
    foreseen = [(x["step"], x["predicted"]) for x in looks if x["predicted"] is not None]
    if foreseen:
        curves["forecast before the look"] = foreseen
    opening = run.get("opening") if measured else None  # before and after: of whole refusals
    of = f", first {opening} of a refusal" if opening else ""
    figures["alignment"] = curve_plot(curves, "step", f"alignment loss (nats a token{of})")
    return figures


def _by_block(curvature: dict[str, Any]) -> list[tuple[float, float]]:
    shares = [
        LayerShare(x["name"], *place(x["name"]), 0, x["share"], 0.0, 0.0)
        for x in curvature["layers"]
    ]
    return list(block_shares(shares).items())
