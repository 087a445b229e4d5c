"""From a result of the curvature benchmark to what people read: tables, plots, a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.curvature.records import CurvatureResult, Details, EigenpairsRow, read
from benchmarks.plots import COLORS, STYLE, save
from safeopt.files import write_whole

PAGE = "report.md"
TITLES = {"hessian": "Hessian", "ggn": "Gauss-Newton"}
Cells = list[list[str]]
# Title, head and rows.
Titled = tuple[str, Sequence[str], Cells]


def report(folder: Path, console: Console) -> Path:
    """Print the tables of a result and write ``report.md`` and the plots beside it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: if there is no finished result.
    """
    result, details = read(folder)
    tables = _tables(result, details)
    for title, head, cells in tables:
        console.print(_printed(title, head, cells))
    for name, reason in details.skipped.items():
        console.print(f"not run: {name} ({reason})", soft_wrap=True)
    save(plots(result, details), folder)
    page = write_whole(folder / PAGE, _markdown(tables, details))
    console.print(f"wrote {page}")
    return page


def plots(result: CurvatureResult, details: Details) -> dict[str, Figure]:
    """Seconds and products of each implementation, and the bytes of each storage."""
    with matplotlib.rc_context(STYLE):
        figures = {"storage": _storage_plot(result)}
        if result.eigenpairs:
            figures["eigenpairs"] = _eigenpairs_plot(result, details)
    return figures


def _tables(result: CurvatureResult, details: Details) -> list[Titled]:
    setting = details.setting
    head: Sequence[str]
    found: list[Titled] = [
        (
            f"Top {setting['rank']} eigenpairs to a residual of {setting['tolerance']:.0e}",
            ("implementation", "operator", "start", "processor s", "wall s", "products",
             "model calls", "residual", "peak MB"),
            [_eigenpairs_cells(row, part) for row, part in _with_parts(result, details)],
        )
    ]  # fmt: skip
    if result.gram is not None:
        spent = details.parts["gram"]["processor_seconds"]
        wall = {
            "one_pass": result.gram.one_pass_seconds,
            "loop": result.gram.loop_seconds,
            "plain": result.gram.forward_backward_seconds,
            "careful": details.parts["gram"][
                "forward_backward_with_logits_at_the_refusals_only_seconds"
            ],
        }
        names = {
            "one_pass": "per-example gradients, Gram matrix and basis in one pass",
            "loop": "the same by a loop over the examples",
            "plain": "plain forward and backward pass, model(**batch).loss",
            "careful": "the same with logits at the refusals only",
        }
        cells = [
            [names[key], f"{spent[key]:.2f}", f"{wall[key]:.2f}",
             f"{spent[key] / spent['plain']:.2f}"]
            for key in names
        ]  # fmt: skip
        head = ("what", "processor s", "wall s", "against the plain pass")
        title = f"{setting['gram_examples']} safety prompts, adapters of rank {setting['narrow']}"
        found.append((title, head, cells))
    if result.basis:
        cells = [
            [row.kind, f"{row.nbytes / 1e6:,.2f}", f"{row.dense_fp32_nbytes / 1e6:,.2f}",
             f"{row.nbytes / row.dense_fp32_nbytes:.1%}", f"{row.projection_error:.1e}"]
            for row in result.basis
        ]  # fmt: skip
        head = ("basis", "MB", "dense fp32 MB", "share", "projection error")
        found.append((f"Storage of {setting['gram_rank']} directions", head, cells))
    if result.aic:
        parts = [part for name, part in details.parts.items() if name.startswith("aic-")]
        cells = [
            [row.implementation, f"{row.parameters:,}", f"{part['processor_seconds']:.1f}",
             f"{row.seconds:.1f}", *(f"{part[key]:.4g}" for key in ("overlap", "epsilon", "gamma"))]
            for row, part in zip(result.aic, parts, strict=True)
        ]  # fmt: skip
        head = ("implementation", "parameters", "processor s", "wall s", "‖Pg‖/‖g‖", "ε", "γ")
        found.append(("Figures of the alignment instability condition", head, cells))
    if memory := details.parts.get("memory"):
        cells = [
            [name, f"{memory[name]['peak_bytes'] / 1e6:,.0f}",
             f"{memory[name]['peak_bytes'] / memory['adamw']['peak_bytes']:.2f}"]
            for name in ("adamw", "projected_adamw")
        ]  # fmt: skip
        head = ("optimizer", "peak MB of the process", "against AdamW")
        found.append(("Training all parameters", head, cells))
    return found


def _eigenpairs_cells(row: EigenpairsRow, part: dict[str, Any]) -> list[str]:
    return [
        row.implementation, TITLES[row.operator], row.start, f"{part['processor_seconds']:.1f}",
        f"{row.seconds:.1f}", str(row.products), str(part["model_calls"]),
        f"{row.max_residual:.1e}", f"{row.peak_bytes / 1e6:.0f}",
    ]  # fmt: skip


def _with_parts(
    result: CurvatureResult, details: Details
) -> list[tuple[EigenpairsRow, dict[str, Any]]]:
    """The rows of the eigenpairs with the details of the parts that made them, in one order."""
    parts = [part for name, part in details.parts.items() if name.split("-")[0] in TITLES]
    return list(zip(result.eigenpairs, parts, strict=True))


def _eigenpairs_plot(result: CurvatureResult, details: Details) -> Figure:
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    operators = list(dict.fromkeys(row.operator for row in result.eigenpairs))
    panels = figure.subplots(1, len(operators), squeeze=False)[0]
    for axes, kind in zip(panels, operators, strict=True):
        of_kind = [pair for pair in _with_parts(result, details) if pair[0].operator == kind][::-1]
        rows = [row for row, _ in of_kind]
        spent = [part["processor_seconds"] for _, part in of_kind]
        names = [f"{row.implementation}\n{row.start}" for row in rows]
        colors = [COLORS[1] if row.implementation == "safeopt" else "#9a9a9a" for row in rows]
        bars = axes.barh(names, spent, color=colors)
        labels = [f"{row.products} products, {row.max_residual:.0e}" for row in rows]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set(title=TITLES[kind], xlabel="processor seconds")
        axes.margins(x=0.6)
        axes.tick_params(axis="y", labelsize=9)
        axes.grid(axis="y", visible=False)
    return figure


def _storage_plot(result: CurvatureResult) -> Figure:
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.subplots()
    rows = result.basis[::-1]
    shares = [100 * row.nbytes / row.dense_fp32_nbytes for row in rows]
    bars = axes.barh([row.kind for row in rows], shares, color=COLORS[1])
    labels = [
        f"{share:.1f}%, error {row.projection_error:.0e}"
        for share, row in zip(shares, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.set(xlabel="percent of the bytes of a dense float32 basis")
    axes.margins(x=0.35)
    axes.grid(axis="y", visible=False)
    return figure


def _printed(title: str, head: Sequence[str], cells: Cells) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*row)
    return table


def _markdown(tables: Sequence[Titled], details: Details) -> str:
    environment = details.environment
    lines = [
        "# Curvature: figures of one run",
        "",
        f"`python -m benchmarks curvature`, {environment['processor']}, "
        f"{environment['threads']} threads, torch {environment['packages']['torch']}.",
    ]
    for title, head, cells in tables:
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |"]
        lines.append("|---" + "|---:" * (len(head) - 1) + "|")
        lines += [f"| {' | '.join(row)} |" for row in cells]
    versions = ", ".join(f"{name} {found}" for name, found in details.peers.items() if found)
    lines += ["", f"Peers: {versions}."]
    if len({(origin.commit, origin.processor) for origin in details.origins.values()}) > 1:
        lines += ["", "Not all parts are of one commit and machine, see `origins` in the details."]
    lines += [f"Not run: {name} ({reason})." for name, reason in details.skipped.items()]
    return "\n".join(lines) + "\n"
