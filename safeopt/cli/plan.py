"""``safeopt plan``: the table of what protection will cost."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from safeopt.cli.console import readable_errors
from safeopt.finetuning.inputs import InputConfig
from safeopt.optim.config import SafetyConfig
from safeopt.plan import Assumptions, Plan
from safeopt.plan import plan as make_plan

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STANDARD = Assumptions()


def plan(
    model: Annotated[
        str, typer.Option(help="A built-in name, a config.json or its folder, or a hub name.")
    ],
    rank: Annotated[
        int, typer.Option(help="Directions of the safety subspace.")
    ] = SafetyConfig.rank,
    full: Annotated[bool, typer.Option("--full", help="Train all parameters, no LoRA.")] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            "--lora",  # its name in earlier versions
            help=f"Rank of the adapter; {InputConfig.lora_rank} by default.",
        ),
    ] = None,
    world_size: Annotated[int, typer.Option(help="Devices that share the state.")] = 1,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="Of the parameters; `safeopt finetune` keeps them in float32."),
    ] = "bfloat16",
    tokens_per_step: Annotated[
        int, typer.Option(help="Tokens of one training step.")
    ] = _STANDARD.tokens_per_step,
    tokens_per_example: Annotated[
        int, typer.Option(help="Tokens of a safety prompt with its refusal.")
    ] = _STANDARD.tokens_per_example,
) -> None:
    """Memory and time that protection takes, from a model's configuration alone."""
    with readable_errors():
        if full and lora_rank is not None:
            raise ValueError(f"full, lora_rank={lora_rank}: all parameters or an adapter, not both")
        if lora_rank is not None and lora_rank < 1:
            raise ValueError(f"lora_rank={lora_rank}: expected at least 1")
        figures = make_plan(
            model,
            rank,
            lora=None if full else InputConfig.lora_rank if lora_rank is None else lora_rank,
            world_size=world_size,
            dtype=_DTYPES[dtype],
            assumptions=Assumptions(
                tokens_per_step=tokens_per_step,
                tokens_per_example=tokens_per_example,
                response_tokens=min(_STANDARD.response_tokens, tokens_per_example),
            ),
        )
    show(figures, Console())


def show(figures: Plan, console: Console) -> None:
    """Print a plan as a table, and what it assumes."""
    what = "all parameters" if figures.lora is None else f"LoRA r={figures.lora}"
    where = "" if figures.world_size == 1 else f", on each of {figures.world_size} devices"
    table = Table(title=f"{figures.model}: {what}, {figures.rank} directions{where}")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("work of a step", justify="right")
    millions = f"{figures.parameters / 1e6:,.1f} M"
    table.add_row(f"parameters ({millions}, {figures.dtype})", _size(figures.parameter_bytes), "")
    trained = f"gradients ({figures.trained / 1e6:,.1f} M trained)"
    table.add_row(trained, _size(figures.gradient_bytes), "")
    table.add_row("AdamW's moments", _size(figures.optimizer_bytes), "", end_section=True)
    sharded = figures.world_size > 1
    for kind, basis in figures.bases.items():
        name = f"basis: {kind}" + " (whole)" * (sharded and kind != "dense")
        table.add_row(name, _size(basis.nbytes), f"+ {basis.step_share:.2%}")
    pulled = "dense" if sharded else "dense, int8"
    table.add_row(f"with elastic ({pulled})", _size(figures.pull_bytes), "")
    console.print(table)
    if sharded:
        console.print(
            "Sharded parameters (FSDP2) take the dense basis only; the whole ones need whole "
            "parameters (DDP)."
        )
    assumed = figures.assumptions
    console.print(
        f"A refresh: {figures.refresh_passes} passes (forward, backward) of "
        f"{figures.refresh_tokens:,} tokens, {figures.refresh_share:.2%} of the training time.\n"
        f"Assumed: {assumed.tokens_per_step:,} tokens a step; a refresh every {assumed.interval} "
        f"steps, with {assumed.examples} examples of {assumed.tokens_per_example} tokens, "
        f"{assumed.response_tokens} of them refusal; a window of {assumed.window} examples; "
        f"r={assumed.side_rank} in the compressed basis. Activations are not counted."
        + ("\nThe weights are quantised; they are counted as before that." * figures.quantised),
        highlight=False,
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError
