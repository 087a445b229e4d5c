"""``safeopt repair``: bring a model back that has lost its alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from safeopt.cli.console import console, loading, quiet_libraries, readable_errors, say
from safeopt.finetuning.repair import RepairConfig
from safeopt.optim.repair import RepairReport

_DEFAULTS = RepairConfig  # one source for the defaults of library and command line


def repair(
    model: Annotated[
        str,
        typer.Option(
            help="The fine-tuned model: DIR/adapter or DIR/model of a run, the folder of another "
            "adapter, or the folder, hub name or GGUF file of a whole model."
        ),
    ],
    reference: Annotated[str, typer.Option(help="The aligned model that it was fine-tuned from.")],
    safety: Annotated[Path, typer.Option(help="JSON lines with harmful prompts.")],
    out: Annotated[Path, typer.Option(help="New folder for the result and repair.json.")],
    train: Annotated[
        Path | None, typer.Option(help="JSON lines of what was learned, to keep it.")
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(help="JSON lines with prompts that must not be refused.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for models that have no chat template.")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Accepted rise of the alignment loss, nats a token.")
    ] = _DEFAULTS.budget,
    refreshes: Annotated[
        int, typer.Option(help="Steps of the repair, at most.")
    ] = _DEFAULTS.refreshes,
    examples: Annotated[
        int, typer.Option(help="Examples of each kind for a step.")
    ] = _DEFAULTS.examples,
    max_length: Annotated[
        int, typer.Option(help="Tokens after which a task example is cut.")
    ] = _DEFAULTS.max_length,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = _DEFAULTS.seed,
) -> None:
    """Restore the refusals that a fine-tuned model has lost, and keep what it has learned."""
    given = dict(locals())
    with readable_errors(), quiet_libraries():
        _repair(RepairConfig(**given))


def _repair(config: RepairConfig) -> None:
    with loading("loading the models and the prompts"):
        from safeopt.finetuning.repair import prepare_repair, run_repair

        prepared = prepare_repair(config)
    what = "adapter" if prepared.is_adapter else "all weights"
    say(
        f"{len(prepared.probe)} safety prompts, {prepared.probe.held_count} harmless ones, "
        f"{len(prepared.task)} task examples; repairing {what}"
    )
    with console.status(f"repairing, at most {config.refreshes} steps"):
        report = run_repair(prepared)
    show(report, Console())
    say(f"wrote {config.out}")


def show(report: RepairReport, to: Console) -> None:
    """Print a report: what was reached, and what it cost."""
    table = Table(title="nats a token")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    limit = report.reference + report.budget
    table.add_row(
        f"alignment loss (aligned: {report.reference:.4f}, limit: {limit:.4f})",
        f"{report.alignment_before:.4f}",
        f"{report.alignment_after:.4f}",
    )
    if report.task_before is not None and report.task_after is not None:
        change = report.task_after / report.task_before - 1
        table.add_row(
            "task loss", f"{report.task_before:.4f}", f"{report.task_after:.4f} ({change:+.1%})"
        )
    to.print(table)
    seconds, tokens = report.passes["seconds"], report.passes["forward_tokens"]
    to.print(
        f"{len(report.steps)} steps; {tokens:,.0f} tokens of safety and task examples, "
        f"{seconds:.0f} s",
        highlight=False,
    )
    if not report.steps:
        to.print("the alignment loss is within its limit already: nothing was changed")
    if report.task_before is None:
        to.print("what it cost in task loss is not known: give --train", highlight=False)
