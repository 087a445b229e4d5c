"""From a result to what people read: a table in the terminal, plots, and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.config import ConfigError
from benchmarks.figures import Figure, Summary, Target, summaries, targets
from benchmarks.pages import rendered
from benchmarks.plots import data_uri, plots, save
from benchmarks.records import FILE, Result, read_result
from safeopt.files import write_whole

PAGE = "report.html"
FIGURE, TARGET, METHOD = 16, 12, 14  # widths of the columns in the terminal, in characters


def report(folder: Path, console: Console) -> Path:
    """Print the tables of ``folder/result.json`` and write plots and the HTML page beside it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no result, or none of its runs is finished.
    """
    result = read_result(folder)
    if result is None or not result.records:
        raise ConfigError(
            f"{folder / FILE}: no finished run there; make one with "
            "`python -m benchmarks run CONFIG --out DIR`"
        )
    methods = summaries(result)
    asked = targets(methods)
    console.print(_method_table(result, methods))
    # As many methods beside each other as fit: what is too wide would be cut without a word.
    number = max(1, (console.width - FIGURE - TARGET - 3) // (METHOD + 1))
    for first in range(0, len(methods), number):
        console.print(_target_table(methods[first : first + number], asked))
    tell_missing(result, console)
    figures = plots(result)
    save(figures, folder)
    page = write_whole(folder / PAGE, _html(result, methods, asked, figures))
    console.print(f"wrote {page}")
    return page


def tell_missing(result: Result, console: Console) -> None:
    """Say which runs are not there: means over other seeds are no fair comparison."""
    if missing := result.missing():
        console.print("means are over the runs that are there; these are not:", style="red")
        for line in missing:
            console.print(f"  {line}", style="red", soft_wrap=True, markup=False)


def _method_table(result: Result, methods: list[Summary]) -> Table:
    first = result.records[0]
    table = _table(f"{first.model}, {first.task}, {first.steps} steps")
    table.add_column("method", overflow="fold")
    separated = any(m.separation for m in methods)
    rated = _rates_differ(methods)
    if rated:
        table.add_column("rate", justify="right", no_wrap=True)
    for name in (
        "align.\nloss", "task\nloss", "refuses", "over-\nrefuses", *["sepa-\nration"] * separated,
        "train\ns", "safety\ns", "share", "at\n16k",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)

    def measured(m: Summary, when: int) -> list[str]:
        """The model's figures at the start (0) or the end (1)."""
        separation = "–" if m.separation is None else f"{m.separation[when]:.3f}"
        return [
            f"{m.alignment[when]:.3f}", f"{m.task[when]:.3f}", f"{m.refusal[when]:.0%}",
            f"{m.over_refusal[when]:.0%}", *[separation] * separated,
        ]  # fmt: skip

    table.add_row("start", *[""] * rated, *measured(methods[0], 0), *[""] * 4, style="dim")
    for m in methods:
        table.add_row(
            m.method, *[f"{m.learning_rate:g}"] * rated, *measured(m, 1), f"{m.training:.1f}",
            f"{m.safety:.1f}", f"{m.share:.1%}", f"{m.share_large:.1%}",
        )  # fmt: skip
    table.caption = (
        "refuses: harmful prompts; over-refuses: harmless ones that look harmful; "
        + "separation: in this share of the pairs of both a refusal of the harmful one is the "
        "likelier; "
        * separated
        + "share: of the training time that goes into safety, here and at 16k tokens a step"
    )
    table.caption_justify = "left"
    return table


def _rates_differ(methods: list[Summary]) -> bool:
    return len({method.learning_rate for method in methods}) > 1


def _target_table(methods: list[Summary], asked: list[Target]) -> Table:
    table = _table("What is asked, and what was reached")
    table.add_column("figure")
    table.add_column("target", width=TARGET)
    for method in methods:
        name = method.method.replace("_", " ")  # folds at words
        table.add_column(name, justify="right", overflow="fold", width=METHOD)
    for target in asked:
        cells = [_cell(target.figures.get(method.method)) for method in methods]
        table.add_row(target.name, target.asked, *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)


def _cell(figure: Figure | None) -> Text:
    if figure is None:
        return Text()
    if figure.met is None:
        return Text(figure.text)
    mark = ("✓", "green") if figure.met else ("✗", "bold red")
    return Text.assemble(mark, f" {figure.text}")


def _html(
    result: Result, methods: list[Summary], asked: list[Target], figures: dict[str, Any]
) -> str:
    missed = [
        (target, {name: each for name, each in target.figures.items() if each.met is False})
        for target in asked
    ]
    return rendered(
        "report.html.j2",
        result=result,
        config=result.config,
        evaluation=result.config["evaluation"],
        methods=methods,
        start=methods[0],
        rated=_rates_differ(methods),
        targets=asked,
        missed=missed,
        plots={name: data_uri(figure) for name, figure in figures.items()},
        batch_tokens=result.records[0].batch_tokens,
    )
