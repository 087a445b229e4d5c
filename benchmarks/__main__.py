"""The benchmark's command line: ``python -m benchmarks run | report | align | demo``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.config import CONFIGS, ConfigError, load_config
from benchmarks.data.sources import DownloadError

Out = Annotated[Path, typer.Option(help="Folder of the result.", file_okay=False)]

app = typer.Typer(
    help="Compare mitigations for benign fine-tuning on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=False)


@app.command()
def run(config: Annotated[Path, typer.Argument(help="A YAML file.")], out: Out) -> None:
    """Run a config and write OUT/result.json; runs that are there already are not done again."""
    from benchmarks.run import run as run_config

    run_config(load_config(config), out, console)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a result.")]) -> None:
    """Print the tables of a result, and write its plots and report.html."""
    from benchmarks.report import report as write_report

    write_report(folder, console)


@app.command()
def align(
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Of initial values and order.")] = 0,
) -> None:
    """Make the adapter with which SmolLM2 refuses harmful prompts."""
    from benchmarks.align import align as make_adapter

    make_adapter(out, steps, seed, console)


@app.command()
def demo(
    out: Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="With a toy model.")] = False,
) -> None:
    """Run the demo's config and report on it."""
    run(CONFIGS / ("demo-tiny.yaml" if tiny else "demo.yaml"), out)
    report(out)


def main() -> None:
    """Run the command line; what the user can mend is told without a traceback."""
    # Their notes on loading are about internals; warnings and errors still come through.
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except (ConfigError, DownloadError, FileNotFoundError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/] {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped; the same command goes on with what is left")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
