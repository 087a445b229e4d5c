"""The benchmark's command line, ``python -m benchmarks``: run, sweep, report, submit, demo."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.config import CONFIGS, ConfigError, RunConfig, SweepConfig, load_config
from benchmarks.jobs import MENDABLE, Executor, Processes, RayCluster, cores, places
from benchmarks.quiet import be_quiet

RAY_THREADS = 2
# Exit codes after Ctrl-C, for which typer itself stands, and after SIGTERM.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

Config = Annotated[Path, typer.Argument(help="A YAML file.")]
Out = Annotated[Path, typer.Option(help="Folder of the result.", file_okay=False)]
Ray = Annotated[
    str | None,
    typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one here."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Two steps with a tiny model of the same architecture."),
]

app = typer.Typer(
    help="Compare mitigations for benign fine-tuning on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Without markup: a grid point's name, adamw[learning_rate=0.001], is no style.
console = Console(highlight=False, soft_wrap=False, markup=False)


@app.command()
def run(
    config: Config,
    out: Out,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at a time; without it all runs share this one."),
    ] = None,
    ray: Ray = None,
    dry_run: DryRun = False,
) -> None:
    """Run a config and write OUT/result.json; runs that are there already are not done again."""
    from benchmarks.dry_run import shrunk
    from benchmarks.run import alone
    from benchmarks.run import run as run_config

    chosen = _one_run(config)
    if dry_run:
        chosen = shrunk(chosen)
    executor, threads = _executor(jobs, ray)
    with alone(out):
        result = run_config(chosen, out, console, executor, threads)
    if result.failures:
        raise SystemExit(1)


@app.command()
def sweep(
    config: Config,
    out: Out,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes at a time; one a GPU or core by default.")
    ] = None,
    ray: Ray = None,
    dry_run: DryRun = False,
) -> None:
    """Tune every method on `val`, run its choice on `test`, and report; resumable."""
    from benchmarks.dry_run import shrunk
    from benchmarks.leaderboard import leaderboard
    from benchmarks.run import alone
    from benchmarks.sweep import sweep as run_sweep

    loaded = load_config(config)
    if not isinstance(loaded, SweepConfig):
        raise ConfigError(f"{config}: a sweep needs `tuning:`; else use `python -m benchmarks run`")
    chosen = shrunk(loaded) if dry_run else loaded
    executor, threads = _executor(jobs or places(), ray)
    with alone(out):
        failed = run_sweep(chosen, out, console, executor, threads)
    leaderboard(out, console)
    if failed:
        console.print(f"{failed} runs failed; the same command tries them again", style="red")
        raise SystemExit(1)


def _executor(jobs: int | None, ray: str | None) -> tuple[Executor | None, int | None]:
    """Where the runs take place, and the threads of each."""
    if ray is not None:
        return RayCluster(ray, RAY_THREADS), RAY_THREADS
    if jobs is None:
        return None, None
    return Processes(jobs), max(1, cores() // jobs)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a result.")]) -> None:
    """Print the tables of a result, and write its page: report, ablation or leaderboard."""
    from benchmarks.ablation import ablation, is_ablation
    from benchmarks.leaderboard import leaderboard
    from benchmarks.report import report as write_report
    from benchmarks.standings import is_sweep

    if is_sweep(folder):
        leaderboard(folder, console)
    elif is_ablation(folder):
        ablation(folder, console)
    else:
        write_report(folder, console)


@app.command()
def submit(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a sweep's results.", file_okay=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The published sweep that it answers.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Check a method instead: path/to/file.py:Class.")
    ] = None,
) -> None:
    """Check results or a method before they are sent in; exit 1 where something is wrong."""
    from benchmarks.submit import check_method, check_result

    if (folder is None) == (method is None):
        raise ConfigError("submit: give either a folder of results or --method FILE.py:Class")
    if method is not None:
        what, problems = method, check_method(method)
    else:
        assert folder is not None
        answered, problems = check_result(folder, config)
        what = f"{folder}: {answered.model.name} on {answered.task.name}"
    for problem in problems:
        console.print(f"✗ {problem}", style="red", soft_wrap=True, markup=False)
    if problems:
        console.print(f"{what}: {len(problems)} problems", soft_wrap=True, markup=False)
        raise SystemExit(1)
    console.print(f"✓ {what}: passes", style="green", soft_wrap=True, markup=False)


@app.command()
def ranking(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results, one a task.")],
    out: Out,
) -> None:
    """Compare the losses of finished runs with what `safeopt.diagnose` foretells for them."""
    from benchmarks.ranking import ranking as compare

    compare(folders, out, console)


@app.command()
def monitor(
    config: Config,
    out: Out,
    budget: Annotated[float, typer.Option(min=0, help="Accepted rise, nats a token.")] = 0.05,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 4,
    examples: Annotated[int, typer.Option(min=1, help="Prompts that are measured.")] = 8,
) -> None:
    """Train under a monitor: where rollbacks end, and how often it raises a false alarm."""
    from benchmarks.monitoring import Watch, monitoring
    from benchmarks.records import leave_others
    from benchmarks.run import alone

    chosen = _one_run(config)
    with alone(out):
        leave_others(out, "monitor")
        monitoring(chosen, Watch(budget, every, examples), out, console)


@app.command()
def align(
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
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


@app.command()
def overhead(
    out: Out,
    config: Annotated[
        Path, typer.Option(help="A YAML file: model, task and batch of the training steps.")
    ] = CONFIGS / "demo.yaml",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training steps.")] = 15,
) -> None:
    """Time steps between refreshes beside AdamW's, interleaved, and write OUT/result.json."""
    from benchmarks.overhead.run import run as measure
    from benchmarks.records import leave_others
    from benchmarks.run import alone

    chosen = _one_run(config)
    with alone(out):
        leave_others(out, "overhead")
        measure(chosen, out, console, rounds)


@app.command()
def curvature(
    out: Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="With a toy model.")] = False,
) -> None:
    """Compare the curvature engine with its public peers; what is there is not run again."""
    from benchmarks.curvature.problem import SMALL, SMOLLM2
    from benchmarks.curvature.report import report as write_report
    from benchmarks.curvature.run import run as run_curvature
    from benchmarks.records import leave_others
    from benchmarks.run import alone

    with alone(out):
        leave_others(out, "curvature")
        run_curvature(SMALL if tiny else SMOLLM2, out, console)
        write_report(out, console)


def _one_run(path: Path) -> RunConfig:
    """A config that is no sweep."""
    config = load_config(path)
    if isinstance(config, SweepConfig):
        raise ConfigError(f"{path}: this is a sweep; use `python -m benchmarks sweep`")
    return config


def main() -> None:
    """Run the command line; what the user can mend is told without a traceback."""
    be_quiet()
    before = signal.signal(signal.SIGTERM, _stop)
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app()
    except MENDABLE as error:
        told.print(f"[bold red]error[/] {escape(str(error))}")
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code in STOPPED:
            told.print("stopped; finished runs are kept, the same command goes on with the others")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    """End as Ctrl-C does, with what stands in ``finally``: child processes, the folder's lock."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
