"""The leaderboard of a sweep: an HTML page, a Markdown table, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.charts import path, scale
from benchmarks.config import BASELINE
from benchmarks.frontier import Interval, nondominated
from benchmarks.metrics import metric_of
from benchmarks.pages import rendered
from benchmarks.standings import Row, Standings, standings
from safeopt.files import write_whole

PAGE, MARKDOWN = "leaderboard.html", "leaderboard.md"
FRONTIER = (640, 456, 56, 50)  # width, height, left and bottom margins, in pixels
PANEL = (180, 110, 30, 18)


def leaderboard(folder: Path, console: Console) -> Path:
    """Print the table of a sweep, and write ``leaderboard.html`` and ``leaderboard.md`` beside it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no sweep in the folder, or its baseline has not finished.
    """
    found = standings(folder)
    console.print(_terminal(found, narrow=console.width < 100))
    write_whole(folder / MARKDOWN, markdown(found))
    page = write_whole(folder / PAGE, _html(found))
    console.print(f"wrote {page} and {MARKDOWN}", soft_wrap=True)
    return page


def markdown(found: Standings) -> str:
    """The leaderboard as a Markdown table, for a README."""
    start = found.test.start
    assert start is not None
    separated = start.separation is not None
    lines = [
        "| method | rise removed | at its own task loss | alignment loss | task loss | refuses "
        f"| over-refuses |{' separation |' * separated} safety time |",
        f"|---|---|---|---|---|---|---|---|{'---|' * separated}",
        f"| start | | | {start.alignment_loss:.3f} | {start.task_loss:.3f} "
        f"| {start.refusal_rate:.0%} | {start.over_refusal_rate:.0%} "
        f"|{_separation_cell(start.separation, found.start_separation)} |",
    ]
    for row in found.rows:
        name = f"**{row.method}**" if row.ours else row.method
        note = f" ({reached(row)})" if reached(row) else ""
        lines.append(
            f"| {name} | {removed(row)}{note} | {own(row)} | {row.alignment:.3f} | {row.task:.3f} "
            f"| {row.refusal:.0%} | {row.over_refusal:.0%} "
            f"|{_separation_cell(row.separation, row.separation_interval)} {row.share:.1%} |"
        )
    seeds, prompts = len(found.config.seeds), found.config.evaluation.alignment_prompts
    lines += [
        "",
        f"{found.config.model.name} on {found.config.task.name}, {found.config.steps} steps, "
        f"{seeds} seeds, {prompts} harmful prompts that no method has seen. Rise removed: share of "
        f"AdamW's rise in alignment loss that is gone at AdamW's task loss "
        f"(+{found.tolerance:.0%}); at its own task loss: compared with what AdamW's frontier has "
        "there; with 95% intervals of a paired bootstrap over seeds and prompts. Reached in: in so "
        "many of its draws the method reaches that task loss, and the interval is of these. Every "
        "method was tuned on other prompts."
        + " Separation: in this share of the pairs of a harmful and a harmless prompt a refusal of "
        "the harmful one is the likelier."
        * separated
        + " Its 95% intervals are of the same bootstrap." * (found.start_separation is not None)
        + f" {found.unequal}".rstrip(),
        "",
    ]
    return "\n".join(lines)


def removed(row: Row) -> str:
    """The share removed with its interval, in words where there is none."""
    if row.method == BASELINE:
        return "baseline"
    if row.matched.alignment is None:
        return "not reached"
    return _interval(row.removed) if row.removed else "nothing rose"


def reached(row: Row) -> str:
    """In how many of the bootstrap's draws AdamW's task loss is reached; empty if in all."""
    if not row.removed or row.matched.reached >= 0.995:
        return ""
    return f"reached in {row.matched.reached:.0%}"


def own(row: Row) -> str:
    """The share removed at the method's own task loss."""
    if row.method == BASELINE:
        return ""
    return _interval(row.matched.own) if row.matched.own else "nothing rose"


def separation_text(value: float | None, interval: Interval | None) -> str:
    """The separation, with its interval where the prompts' scores are known."""
    if value is None:
        return "–"
    width = "" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{value:.3f}{width}"


def _separation_cell(value: float | None, interval: Interval | None) -> str:
    """A cell of the Markdown table; no cell without the figure."""
    return "" if value is None else f" {separation_text(value, interval)} |"


def _interval(share: Interval) -> str:
    return f"{share.value:.1%} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _terminal(found: Standings, *, narrow: bool) -> Table:
    table = Table(
        title=f"{found.config.model.name}, {found.config.task.name}, at task loss "
        f"{found.target:.3f}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("#", justify="right")
    table.add_column("method", overflow="fold")
    # In 80 characters names and intervals are folded, numbers are not.
    for name in ("rise removed", "own task loss"):
        table.add_column(name, justify="right", width=9 if narrow else None)
    for name in ("align.\nloss", "task\nloss", "refuses", "over-\nrefuses"):
        table.add_column(name, justify="right", no_wrap=True)
    separated = found.test.start is not None and found.test.start.separation is not None
    if separated:
        table.add_column("sepa-\nration", justify="right", width=7 if narrow else None)
    table.add_column("safety", justify="right", no_wrap=True)
    for number, row in enumerate(found.rows, start=1):
        table.add_row(
            str(number), row.method.replace("_", " "),
            f"{removed(row)}\n{reached(row)}".strip(), own(row),
            f"{row.alignment:.3f}", f"{row.task:.3f}",
            f"{row.refusal:.0%}", f"{row.over_refusal:.0%}",
            *[separation_text(row.separation, row.separation_interval)] * separated,
            f"{row.share:.1%}",
            style="bold" if row.ours else "",
        )  # fmt: skip
    return table


def _html(found: Standings) -> str:
    return rendered(
        "leaderboard.html.j2",
        found=found,
        config=found.config,
        result=found.test,
        start=found.test.start,
        rows=found.rows,
        removed=removed,
        reached=reached,
        own=own,
        separation_text=separation_text,
        baseline=BASELINE,
        metric=metric_of(found.config.task.name)[0],
        frontier=_frontier(found),
        panels=_panels(found),
    )


def _frontier(found: Standings) -> dict[str, Any]:
    """The drawing of alignment loss against task loss: every method's points and frontier."""
    width, height, left, bottom = FRONTIER
    points = [point for row in found.rows for point in row.points]
    # The start's task loss is far away; what is compared is where methods end.
    x = scale([point.task for point in points] + [found.target], left, width - 16)
    y = scale([point.alignment for point in points], height - bottom, 34, zero=True, wide=True)
    # Later ones are drawn over earlier ones: the first places last, and what readers look for.
    drawn = sorted(
        enumerate(found.rows, start=1),
        key=lambda each: (each[1].ours or each[1].method == BASELINE, -each[0]),
    )
    return {
        "width": width,
        "height": height,
        "left": left,
        "bottom": height - bottom,
        "x": x,
        "y": y,
        "target": x(found.target),
        "methods": [
            {
                "row": row,
                "number": number,
                "x": x(row.task),
                "y": y(row.alignment),
                "others": [(x(point.task), y(point.alignment)) for point in row.points[1:]],
                "line": path([(x(p.task), y(p.alignment)) for p in nondominated(row.points)]),
            }
            for number, row in drawn
        ],
    }


def _panels(found: Standings) -> dict[str, Any]:
    """One small drawing for each method: the alignment loss over the steps, every seed."""
    width, height, left, bottom = PANEL
    curves = [curve for row in found.rows for curve in row.curves]
    x = scale([0, found.config.steps], left, width - 8)
    y = scale([value for curve in curves for _, value in curve], height - bottom, 8, zero=True)
    return {
        "width": width,
        "height": height,
        "left": left,
        "bottom": height - bottom,
        "y": y,
        "last": x(found.config.steps),
        "first": x(0),
        "lines": [
            (row, [path([(x(step), y(value)) for step, value in curve]) for curve in row.curves])
            for row in found.rows
        ],
    }
