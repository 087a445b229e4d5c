"""The report of an ablation: one option varied at a time, and what becomes of both losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.charts import scale
from benchmarks.config import ConfigError
from benchmarks.pages import rendered
from benchmarks.records import FILE, Record, Result, read_result
from benchmarks.report import tell_missing
from safeopt.files import write_whole

PAGE, MARKDOWN = "ablation.html", "ablation.md"
WIDTH, ROW, LEFT = 480, 26, 210  # pixels


@dataclass(frozen=True)
class Value:
    """One value of an option: the ends of its runs."""

    label: str
    alignment: tuple[float, ...]
    task: tuple[float, ...]
    refusal: tuple[float, ...]
    over_refusal: tuple[float, ...]
    share: float

    @property
    def over_refusals(self) -> str:
        """Of every seed: their mean would hide a run that refuses everything."""
        return ", ".join(f"{100 * rate:.0f}" for rate in self.over_refusal) + "%"

    @staticmethod
    def mean(values: Sequence[float]) -> float:
        """The mean over seeds."""
        return sum(values) / len(values)


def is_ablation(folder: Path) -> bool:
    """Whether a folder holds a result with varied options.

    The grid points of a sweep's stage have a group, too, but it is their own method: their label is
    the group's name, or begins with it and a bracket.
    """
    result = read_result(folder)
    return result is not None and any(
        group and label != group and not label.startswith(f"{group}[")
        for group, label in ((e.get("group"), e.get("label")) for e in result.config["methods"])
    )


def panels(result: Result) -> dict[str, list[Value]]:
    """The values of every option, in the config's order; what was not varied stands under ""."""
    found: dict[str, list[Value]] = {}
    for method in result.run_config().methods:
        records = [record for record in result.records if record.method == method.key]
        if records:
            label = method.key.removeprefix(f"{method.group}=")
            found.setdefault(method.group, []).append(_value(label, records))
    return found


def ablation(folder: Path, console: Console) -> Path:
    """Print a table for each option, and write ``ablation.html`` and ``ablation.md``.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no finished run.
    """
    result = read_result(folder)
    if result is None or not result.records:
        raise ConfigError(f"{folder / FILE}: no finished run there")
    found = panels(result)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("option", "value"):
        table.add_column(name, overflow="fold")
    for name in ("align. loss", "task loss", "refuses", "over-refuses", "safety"):
        table.add_column(name, justify="right")
    lines = [
        "| option | value | alignment loss | task loss | refuses | over-refuses, by seed "
        "| safety time |",
        "|---|---|---|---|---|---|---|",
    ]
    for option, values in found.items():
        for value in values:
            cells = [
                option, value.label, f"{value.mean(value.alignment):.3f}",
                f"{value.mean(value.task):.3f}", f"{value.mean(value.refusal):.0%}",
                value.over_refusals, f"{value.share:.1%}",
            ]  # fmt: skip
            table.add_row(*cells)
            lines.append(f"| {' | '.join(cells)} |")
    console.print(table)
    tell_missing(result, console)
    write_whole(folder / MARKDOWN, "\n".join(lines) + "\n")
    page = write_whole(folder / PAGE, _html(result, found))
    console.print(f"wrote {page} and {MARKDOWN}", soft_wrap=True)
    return page


def _value(label: str, records: Sequence[Record]) -> Value:
    safety = sum(record.seconds.safety for record in records)
    training = safety + sum(record.seconds.task for record in records)
    return Value(
        label=label,
        alignment=tuple(record.alignment_loss.end for record in records),
        task=tuple(record.task_loss.end for record in records),
        refusal=tuple(record.refusal_rate.end for record in records),
        over_refusal=tuple(record.over_refusal_rate.end for record in records),
        share=safety / training if training > 0 else 0.0,
    )


def _html(result: Result, found: dict[str, list[Value]]) -> str:
    everything = [value for values in found.values() for value in values]
    return rendered(
        "ablation.html.j2",
        result=result,
        config=result.run_config(),
        panels=found,
        width=WIDTH,
        row=ROW,
        left=LEFT,
        x=scale(
            [a for value in everything for a in value.alignment],
            LEFT + 6,  # room for a mark
            WIDTH - 14,
            zero=True,
            wide=True,
        ),
    )
