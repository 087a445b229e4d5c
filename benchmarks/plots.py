"""The plots of a result: curves over the steps, and alignment loss against task loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import Point, Record, Result

if TYPE_CHECKING:  # younger than the oldest matplotlib that is supported
    from matplotlib.typing import RcKeyType

# Okabe and Ito's palette, which people with any kind of color vision can tell apart; the yellow is
# left out, it is too light for lines. Markers repeat the difference.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK = "#222222"  # of names: half of the colors are too light to be read as text
SIZE = (5.6, 4.0)
STYLE: dict[RcKeyType, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.hashsalt": "safeopt",
    "font.family": "sans-serif",
}

Coordinate = Callable[[Point], float]


def plots(result: Result) -> dict[str, Figure]:
    """All plots, by the name of their file."""
    with matplotlib.rc_context(STYLE):
        return {
            "alignment_loss": _plot(result, _step, _alignment, "step", "alignment loss (nats)"),
            "task_loss": _plot(result, _step, _task, "step", "task loss (nats)"),
            "frontier": _plot(
                result,
                _task,
                _alignment,
                "task loss (nats), better to the right",
                "alignment loss (nats), safer below",
            ),
        }


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Write every plot as ``folder/NAME.png``."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white")


def data_uri(figure: Figure) -> str:
    """The plot as an SVG image inside a data URI."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _plot(result: Result, x: Coordinate, y: Coordinate, x_name: str, y_name: str) -> Figure:
    # Not through pyplot: nothing is shown, and nothing must be closed.
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(record.method for record in result.records))
    ends = []
    for index, method in enumerate(methods):
        color, marker = look(index)
        records = [record for record in result.records if record.method == method]
        for record in records:
            _line(axes, record, x, y, color, marker)
        last = [record.curve[-1] for record in records]
        ends.append((_mean(x, last), _mean(y, last), method, (color, marker)))
    start = result.records[0].curve[0]
    axes.plot(x(start), y(start), "o", color="#444444", markersize=7, zorder=5)
    axes.annotate(
        "start", (x(start), y(start)), xytext=(0, 9), textcoords="offset points", color="#444444",
        ha="center",
    )  # fmt: skip
    axes.set(xlabel=x_name, ylabel=y_name)
    if x(start) > ends[0][0]:
        axes.invert_xaxis()  # time runs to the right, as in the other plots
    axes.margins(x=0.08, y=0.12)
    if y(start) >= 0:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    _label_ends(axes, ends)
    return figure


def look(index: int) -> tuple[str, str]:
    """Color and marker of a method; where the colors begin again, each has another marker."""
    again, color = divmod(index, len(COLORS))
    return COLORS[color], MARKERS[(index + again) % len(MARKERS)]


def _step(point: Point) -> float:
    return point.step


def _task(point: Point) -> float:
    return point.task_loss


def _alignment(point: Point) -> float:
    return point.alignment_loss


def _line(
    axes: Axes, record: Record, x: Coordinate, y: Coordinate, color: str, marker: str
) -> None:
    points = record.curve
    axes.plot(
        [x(p) for p in points], [y(p) for p in points], color=color, marker=marker, markersize=4,
        linewidth=1.8,
    )  # fmt: skip
    axes.plot(x(points[-1]), y(points[-1]), marker, color=color, markersize=8)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, tuple[str, str]]]) -> None:
    """Write each method's name beside its line's end, moved apart where two would overlap.

    The names stand in a column right of the axes, in the order of the ends' heights, each behind
    its method's mark.
    """
    low, high = axes.get_ylim()
    apart = 0.075 * (high - low)
    heights: list[float] = []
    for _, height, _, _ in sorted(ends, key=lambda end: end[1]):
        heights.append(max(height, heights[-1] + apart) if heights else max(height, low))
    excess = max(0.0, heights[-1] - high) if heights else 0.0
    left, right = axes.get_xlim()
    mark = right + 0.04 * (right - left)
    for (x, y, method, (color, marker)), height in zip(
        sorted(ends, key=lambda end: end[1]), heights, strict=True
    ):
        place = height - excess
        axes.plot([x, mark], [y, place], color=color, alpha=0.5, linewidth=0.8, clip_on=False)
        axes.plot(mark, place, marker, color=color, markersize=6, clip_on=False)
        axes.annotate(
            method.replace("_", " "), (mark, place), xytext=(8, 0), textcoords="offset points",
            color=INK, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))  # the marks outside would widen them


def _mean(of: Coordinate, points: Sequence[Point]) -> float:
    return sum(of(point) for point in points) / len(points)
