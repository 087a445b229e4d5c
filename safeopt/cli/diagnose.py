"""``safeopt diagnose``: the Alignment Instability Condition before the first step of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from safeopt.cli.console import console, loading, quiet_libraries, readable_errors, say
from safeopt.finetuning.folders import check_folder
from safeopt.finetuning.inputs import InputConfig

if TYPE_CHECKING:
    from safeopt.diagnostics import Diagnosis

_DEFAULTS = InputConfig
_RISKS = {"at risk": "bold red", "at risk at once": "bold red", "unclear": "yellow"}


def diagnose(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file of an aligned model.")],
    train: Annotated[Path, typer.Option(help="JSON lines that the model will be trained on.")],
    safety: Annotated[Path, typer.Option(help="JSON lines with harmful prompts.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for aic.json, the HTML page and its plots.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a model that has no chat template.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="For training all parameters.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = _DEFAULTS.lora_rank,
    lora_alpha: Annotated[int, typer.Option(help="Scale of the adapter.")] = _DEFAULTS.lora_alpha,
    batch_size: Annotated[int, typer.Option(help="Examples of a batch.")] = _DEFAULTS.batch_size,
    batches: Annotated[int, typer.Option(help="Training batches to look at, at least 2.")] = 4,
    max_length: Annotated[
        int, typer.Option(help="Tokens after which an example is cut; fewer are faster.")
    ] = 128,
    rank: Annotated[
        int | None, typer.Option(help="Directions of the subspace; 16, or half of the examples.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Safety examples to look at, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULTS.seed,
) -> None:
    """Check whether a model is unstable under a task, before training. Writes nothing but --out."""
    config = dict(locals())
    with readable_errors(), quiet_libraries():
        for name in ("out", "batches", "rank", "examples"):
            config.pop(name)
        inputs = InputConfig(**config)
        if batches < 2:
            raise ValueError(f"batches={batches}: an interval needs at least two")
        if examples < 2:
            raise ValueError(f"examples={examples}: a spectrum needs at least two safety examples")
        if out is not None:
            check_folder(out)
        result = _diagnose(inputs, batches, rank, examples)
        page = None
        if out is not None:  # before the figures are shown: a closed pipe would end it
            from safeopt.diagnostics.report import write_report

            page = write_report(result, out, inputs.as_dict())
        show(result, Console())
        if page is not None:
            say(f"wrote {page}")


def _diagnose(config: InputConfig, batches: int, rank: int | None, examples: int) -> Diagnosis:
    with loading("loading and checking the model, the data and the safety prompts"):
        from safeopt.diagnostics import diagnose
        from safeopt.finetuning.inputs import load_inputs, task_batches

        inputs = load_inputs(config, at_least=2, at_most=examples)
        task = task_batches(inputs, config.batch_size, batches, config.seed)
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None)

        def show_progress(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        result = diagnose(
            inputs.probe,
            task,
            rank=rank,
            examples=examples,
            seed=config.seed,
            listener=show_progress,
        )
        progress.update(bar, completed=progress.tasks[0].total)
    return result


def show(result: Diagnosis, to: Console) -> None:
    """Print a diagnosis: the conditions, the layers that matter most, the verdict."""
    style: dict[str, Any] = {
        "box": box.SIMPLE_HEAD,
        "title_justify": "left",
        "padding": (0, 0, 0, 1),
    }
    table = Table(title="Alignment Instability Condition", **style)
    table.add_column("condition", no_wrap=True)
    for name in ("value", "95% interval", "threshold", "holds"):
        table.add_column(name, justify="right", no_wrap=True)
    sides = {"curvature_coupling": "above"}
    for condition in result.conditions:
        low, high = condition.interval
        table.add_row(
            condition.name.replace("_", " "), f"{condition.value:.2g}",
            f"{low:.2g} – {high:.2g}",
            f"{sides.get(condition.name, 'at most')} {condition.threshold:.2g}",
            ("yes" if condition.holds else "no") + ("" if condition.certain else ", unsure"),
        )  # fmt: skip
    to.print(table)
    f = result.figures
    to.print(
        f"k={result.rank} of {result.evidence.size:,} parameters: λ₁ {f.top:.3g}, "
        f"λ_k {f.lowest:.3g}, effective rank {f.effective_rank:.1f}. Angle to the subspace: "
        f"gradient {result.angle:.3f}, Adam's first update {result.update_angle:.3f} rad "
        "(a right angle is 1.571).",
        highlight=False,
    )
    layers = Table(title="Where the safety curvature is", **style)
    layers.add_column("layer", overflow="fold")
    for name in ("parameters", "curvature", "task gradient"):
        layers.add_column(name, justify="right")
    for layer in sorted(result.layers, key=lambda layer: -layer.curvature)[:8]:
        layers.add_row(
            layer.name, f"{layer.parameters:,}", f"{layer.curvature:.1%}", f"{layer.gradient:.1%}"
        )
    to.print(layers)
    color = _RISKS.get(result.verdict.risk, "bold")
    to.print(f"[{color}]{result.verdict.risk}[/]: {result.verdict.text}", highlight=False)
    for note in result.verdict.notes:
        to.print(f"- {note}", highlight=False, style="dim")
