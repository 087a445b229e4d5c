"""``python -m benchmarks overhead``: all ratios, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.config import RunConfig
from benchmarks.environment import environment
from benchmarks.overhead import optimizer_step, training_step
from benchmarks.overhead.timing import interleaved, milliseconds, ratio
from benchmarks.records import FILE
from safeopt.files import write_json

# The largest ratio that counts as reached, see the table's last column. For `step()` alone with the
# pull none was set.
TARGETS = {
    "optimizer_step_ratio": 3.0,
    "training_step_ratio": 1.03,
    "elastic_training_step_ratio": 1.03,
    "sam_two_pass_ratio": 2.1,
    "sam_lookahead_ratio": 1.1,
}


def run(config: RunConfig, out: Path, console: Console, rounds: int) -> dict[str, Any]:
    """Measure, print and write ``out/result.json``.

    Args:
        config: what is trained in the training steps.
        out: folder of the result.
        console: where the table is printed.
        rounds: measured rounds of training steps; three times as many of bare optimizer steps.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with console.status("optimizer steps on 2M parameters"):
        steps = optimizer_step.steps()
        bare = interleaved(steps.runs, 3 * rounds)
    with (
        console.status(f"training steps of {config.model.name}"),
        training_step.steps(config) as trained,
    ):
        whole = interleaved(trained.runs, rounds)
    figures, in_cpu_time = _figures(bare.wall, whole.wall), _figures(bare.cpu, whole.cpu)
    result = {
        **figures,
        "targets": TARGETS,
        "cpu_time": in_cpu_time,
        "rounds": {"optimizer_step": 3 * rounds, "training_step": rounds},
        "parameters": {
            "optimizer_step": steps.parameters,
            "training_step": trained.parameters,
        },
        "rank": {"optimizer_step": steps.rank, "training_step": trained.rank},
        "optimizer_step_milliseconds": milliseconds(bare.wall),
        "training_step_milliseconds": milliseconds(whole.wall),
        "config": config.as_json(),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, result)
    table = Table("figure", "measured", "in CPU time", "at most")
    for name, value in figures.items():
        most = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        table.add_row(name, f"{value:.3f}", f"{in_cpu_time[name]:.3f}", most)
    console.print(table)
    return result


def _figures(bare: dict[str, list[float]], whole: dict[str, list[float]]) -> dict[str, float]:
    """All ratios by one clock."""
    return {
        "optimizer_step_ratio": ratio(bare, optimizer_step.PROTECTED, optimizer_step.PLAIN),
        "elastic_optimizer_step_ratio": ratio(bare, optimizer_step.ELASTIC, optimizer_step.PLAIN),
        "training_step_ratio": ratio(whole, training_step.PROTECTED, training_step.PLAIN),
        "elastic_training_step_ratio": ratio(whole, training_step.ELASTIC, training_step.PLAIN),
        "sam_two_pass_ratio": ratio(whole, training_step.TWO_PASS, training_step.PLAIN),
        "sam_lookahead_ratio": ratio(whole, training_step.LOOKAHEAD, training_step.PLAIN),
    }
