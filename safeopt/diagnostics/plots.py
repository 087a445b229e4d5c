"""Plots of a diagnosis and of a curvature profile, as SVG data for a page or PNG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, which people with any kind of color vision can tell apart.
ORANGE, BLUE, GREEN, PINK, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#555555"
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.hashsalt": "safeopt",
    "legend.frameon": False,
}
_SIZE = (5.6, 3.6)


def spectrum_plot(eigenvalues: Sequence[float], rank: int) -> Figure:
    """Eigenvalues of the safety curvature on a logarithmic axis; the top k are filled."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _plot("eigenvalue", "index")
        positive = [(i, v) for i, v in enumerate(eigenvalues, start=1) if v > 0]
        for chosen, label, fill in (
            ([x for x in positive if x[0] <= rank], f"safety subspace, k = {rank}", BLUE),
            ([x for x in positive if x[0] > rank], "tail", "white"),
        ):
            if chosen:
                axes.plot(*zip(*chosen, strict=True), "o", color=BLUE, mfc=fill, label=label)
        axes.set_yscale("log")
        axes.legend()
        return figure


def layer_plot(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of the safety curvature and of the task's gradient by transformer block."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _plot("share", "transformer block")
        blocks = sorted({x["block"] for x in layers if x["block"] is not None})
        names = [str(block) for block in blocks]
        groups = [[x for x in layers if x["block"] == block] for block in blocks]
        outside = [x for x in layers if x["block"] is None]
        if outside:
            names.append("rest")
            groups.append(outside)
        places = range(len(groups))
        total, inside, task = (
            [sum(x[key] for x in group) for group in groups]
            for key in ("curvature", "subspace", "gradient")
        )
        axes.bar(places, total, color=BLUE, alpha=0.35, label="safety curvature")
        axes.bar(places, inside, color=BLUE, label="of it in the subspace")
        axes.plot(places, task, "o", color=ORANGE, markersize=5, label="task's gradient")
        step = max(1, len(names) // 10)
        axes.set_xticks(list(places)[::step], names[::step])
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.05 * max([*total, *task, 1e-12]))
        # Above the axes: within, it hides bars.
        figure.legend(ncols=3, fontsize=9, loc="outside upper left", columnspacing=1.2)
        return figure


def curve_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    *,
    lines: Mapping[str, float] | None = None,
    logarithmic: Literal["", "y", "xy"] = "",
) -> Figure:
    """Named curves; the first is measured (points), the others are predictions (dashes).

    Args:
        curves: points ``(x, y)`` by name.
        x_name: label of the horizontal axis.
        y_name: label of the vertical axis.
        lines: levels to mark, by name.
        logarithmic: which axes are.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _plot(y_name, x_name)
        styles, colors = ("o-", "--", ":", "-."), (ORANGE, GREY, BLUE, GREEN, PINK)
        for index, (name, points) in enumerate(curves.items()):
            style, color = styles[index % len(styles)], colors[index % len(colors)]
            if logarithmic:
                points = [(x, y) for x, y in points if y > 0 and (x > 0 or logarithmic == "y")]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=4)
        for name, level in (lines or {}).items():
            axes.axhline(level, color="0.6", linewidth=1)
            axes.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                color="0.4", fontsize=9,
            )  # fmt: skip
        if logarithmic:
            axes.set_yscale("log")
        if logarithmic == "xy":
            axes.set_xscale("log")
        else:  # steps, blocks and indices are whole numbers
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 4:
            figure.legend(loc="outside right upper", fontsize=8)
        else:
            axes.legend(fontsize=9)
        return figure


def data_uri(figure: Figure) -> str:
    """The plot as an SVG image inside a data URI."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _plot(y_name: str, x_name: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_name, ylabel=y_name)
    return figure, axes
