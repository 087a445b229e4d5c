"""``safeopt finetune``: fine-tuning with a progress bar, Ctrl-C, SIGTERM and resume."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from safeopt.cli.console import console, end, loading, quiet_libraries, readable_errors, say
from safeopt.finetuning.config import FinetuneConfig
from safeopt.optim import optimizers

_DEFAULTS = FinetuneConfig  # one source for the defaults of library and command line


def finetune(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file of an aligned model.")],
    train: Annotated[Path, typer.Option(help="JSON lines to learn from.")],
    safety: Annotated[Path, typer.Option(help="JSON lines with harmful prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints, report and plot.")],
    harmless: Annotated[
        Path | None, typer.Option(help="JSON lines with prompts that must not be refused.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a model that has no chat template.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help=f"{', '.join(optimizers())}, or adamw for comparison.")
    ] = _DEFAULTS.optimizer,
    full: Annotated[bool, typer.Option("--full", help="Train all parameters, no LoRA.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = _DEFAULTS.lora_rank,
    lora_alpha: Annotated[int, typer.Option(help="Scale of the adapter.")] = _DEFAULTS.lora_alpha,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = _DEFAULTS.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Decoupled weight decay.")
    ] = _DEFAULTS.weight_decay,
    warmup_steps: Annotated[int, typer.Option(help="Linear warm-up.")] = _DEFAULTS.warmup_steps,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = _DEFAULTS.epochs,
    max_steps: Annotated[
        int, typer.Option(help="Optimizer steps; -1: by epochs.")
    ] = _DEFAULTS.max_steps,
    batch_size: Annotated[int, typer.Option(help="Examples in a pass.")] = _DEFAULTS.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Passes for one step.")
    ] = _DEFAULTS.gradient_accumulation,
    max_length: Annotated[
        int, typer.Option(help="Tokens after which an example is cut.")
    ] = _DEFAULTS.max_length,
    rank: Annotated[int, typer.Option(help="Directions that are protected.")] = _DEFAULTS.rank,
    budget: Annotated[
        float, typer.Option(help="Accepted rise of the alignment loss, nats a token.")
    ] = _DEFAULTS.budget,
    elastic: Annotated[
        float, typer.Option(help="Strength of the pull to the aligned model, such as 0.5.")
    ] = _DEFAULTS.elastic,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints.")
    ] = _DEFAULTS.save_steps,
    logging_steps: Annotated[
        int, typer.Option(help="Steps between lines of the log.")
    ] = _DEFAULTS.logging_steps,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULTS.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again although --out holds a run.")
    ] = False,
) -> None:
    """Fine-tune with LoRA (or --full), keeping the refusals of the safety prompts."""
    given = dict(locals())
    with readable_errors(), quiet_libraries():
        _finetune(FinetuneConfig(**given))


def _finetune(config: FinetuneConfig) -> None:
    with loading("loading and checking the model, the data and the safety prompts"):
        from safeopt.finetuning.prepare import prepare
        from safeopt.finetuning.run import Progress, run

        prepared = prepare(config)
    inputs = prepared.inputs
    learned, (used, asked) = len(inputs.rows), inputs.refused
    say(
        f"{learned} of {inputs.train_given} training examples and {used} of {asked} safety prompts "
        "are used"
    )
    if learned < inputs.train_given:
        say(f"the prompts of the other training examples fill max_length={config.max_length}")
    if used < asked:
        say("the model does not refuse the other safety prompts")
    bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    task = bar.add_task("", total=None)
    view = Live(bar.get_renderable(), console=console)

    def show(progress: Progress) -> None:
        bar.update(task, completed=progress.step, total=progress.max_steps)
        view.update(Group(bar.get_renderable(), Text(_description(progress))))

    try:
        with view, _interruptible() as interrupted:
            outcome = run(prepared, show, lambda: interrupted() != 0)
    finally:
        if not console.is_terminal:
            console.print()  # the last view in a log has no line end
    ends = outcome.report["alignment_loss"]
    say(
        f"alignment loss {ends['start']:.3f} before, {ends['end']:.3f} after: nats a token, of "
        f"the first {outcome.report['opening']} tokens of each refusal"
    )
    if outcome.finished:
        say(f"wrote {outcome.folder}, {config.out}/run.json and {config.out}/curves.png")
        failure = outcome.report["failure"]
        if failure is not None:
            end("failed", failure, status=1)  # what would use the result next must not start
        return
    arguments = [argument for argument in sys.argv[1:] if argument != "--overwrite"]
    again = shlex.join(["safeopt", *arguments, *(() if config.resume else ("--resume",))])
    console.print("[yellow]interrupted; a checkpoint was saved. Continue with[/]")
    say(f"  {again}")
    raise typer.Exit(128 + interrupted())  # as of a process that the signal has ended


def _description(progress: Any) -> str:
    """Two short lines: task and alignment loss; coupling and the safety passes' share of time."""
    losses, others = [], []
    if progress.task_loss is not None:
        losses.append(f"task loss {progress.task_loss:.3f}")
    figures = progress.figures
    if "alignment_loss" in figures:
        losses.append(
            f"alignment loss {figures['alignment_loss']:.3f} "
            f"(predicted {figures['alignment_predicted']:.3f})"
        )
    if "coupling" in figures:
        others.append(f"coupling {figures['coupling']:.3g}")
    if figures and progress.safety_share is not None:
        others.append(f"safety passes take {progress.safety_share:.0%} of the time")
    return "\n".join(" · ".join(line) for line in (losses, others) if line)


@contextmanager
def _interruptible() -> Iterator[Callable[[], int]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop at the end of the step.

    Yields:
        What returns the number of that signal, 0 before it.
    """
    asked = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if not asked:
            asked = number
            console.print("[yellow]stopping after this step (Ctrl-C again: at once)[/]")
        elif number == signal.SIGINT:  # clusters that preempt a job may send SIGTERM twice
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
