"""What `safeopt.SafetyMonitor` does on real runs: where a rollback ends, and false alarms.

Every method of a config is trained under the eyes of a monitor that has safety prompts of its own:
the method gets one half of them, the monitor the other. An unprotected run is rolled back; a
protected one is only warned of. Whenever the monitor measures, the evaluation's harmful prompts are
measured, too: an alarm is false where these are within the budget.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Bench
from benchmarks.config import MethodConfig, RunConfig
from benchmarks.environment import environment
from benchmarks.methods import method_class
from benchmarks.models import trainable
from benchmarks.records import FILE, Start
from benchmarks.training import StepLoss
from safeopt import SafetyMonitor, SafetyProbe
from safeopt.files import write_json


class Watch(NamedTuple):
    """Arguments of the monitor."""

    budget: float
    every: int
    examples: int


def monitoring(config: RunConfig, watch: Watch, out: Path, console: Console) -> dict[str, Any]:
    """Run every method with every seed and write ``out/result.json``.

    Args:
        config: what to train.
        watch: the monitors' arguments.
        out: folder of the result.
        console: for progress and the table.
    """
    bench = Bench(config)
    start = bench.measure_start()
    runs = []
    for seed in config.seeds:
        for method in config.methods:
            with console.status(f"{method.key}, seed {seed}"):
                runs.append(_watched(bench, method, seed, start, watch))
            console.print(_line(runs[-1]), soft_wrap=True, markup=False)
    judged = [check for run in runs if run["protected"] for check in run["checks"]]
    result = {
        "watch": watch._asdict(),
        "start": {"alignment_loss": start.alignment_loss, "refusal_rate": start.refusal_rate},
        "protected_runs": {
            "checks": len(judged),
            "alarms": sum(check["alarm"] for check in judged),
            "false_alarms": sum(check["alarm"] and check["unseen_within"] for check in judged),
            "missed": sum(not check["alarm"] and not check["unseen_within"] for check in judged),
        },
        "runs": runs,
        "config": config.as_json(),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, result)
    _show(result, console)
    return result


def _watched(
    bench: Bench, method: MethodConfig, seed: int, start: Start, watch: Watch
) -> dict[str, Any]:
    config, evaluator = bench.config, bench.evaluator
    device = next(bench.model.parameters()).device
    limit = start.alignment_loss + watch.budget
    checks: list[dict[str, Any]] = []
    with trainable(bench.model, config.lora, seed) as (model, params):
        setup = bench.setup(method, seed, model, params)
        half = len(setup.safety) // 2
        trained, watched = setup.safety[:half], setup.safety[half:]
        rival: Any = method_class(method.name)(replace(setup, safety=trained), method.options())
        protected = hasattr(rival.optimizer, "safety")
        monitor = SafetyMonitor(
            rival.optimizer,
            SafetyProbe(model, watched),
            **watch._asdict(),
            action="warn" if protected else "rollback",
            seed=seed,
        )
        for step, batch in enumerate(bench.task_batches(seed, device), start=1):
            rival.step(StepLoss(model, batch))
            if step == config.steps:
                rival.finish()
            check = monitor.check(step, measure=step == config.steps)
            if check.alignment_loss is not None:
                with rival.evaluating():
                    unseen = evaluator.losses(model).alignment
                row = {"unseen_alignment_loss": unseen, "unseen_within": unseen <= limit}
                checks.append({**asdict(check), **row})
            if check.stop:
                break
        with rival.evaluating():
            end, rates = evaluator.losses(model), evaluator.rates(model)
        monitor.close()
    return {
        "method": method.key,
        "seed": seed,
        "protected": protected,
        "last_step": step,
        "rollbacks": monitor.rollbacks,
        "alignment_loss": end.alignment,
        "within_budget": end.alignment <= limit,
        "task_loss": {"start": start.task_loss, "end": end.task},
        "refusal_rate": rates.refusal,
        "over_refusal_rate": rates.over_refusal,
        "checks": checks,
    }


def _line(run: dict[str, Any]) -> str:
    return (
        f"{run['method']}, seed {run['seed']}: ended at step {run['last_step']} after "
        f"{run['rollbacks']} rollbacks, alignment loss {run['alignment_loss']:.3f}, "
        f"refuses {run['refusal_rate']:.0%}, task loss {run['task_loss']['end']:.3f}"
    )


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("method", "seed", "checks", "alarms", "rollbacks", "ends within", box=box.SIMPLE)
    for run in result["runs"]:
        alarms = sum(check["alarm"] for check in run["checks"])
        numbers = (run["seed"], len(run["checks"]), alarms, run["rollbacks"])
        within = "yes" if run["within_budget"] else "no"
        table.add_row(run["method"], *map(str, numbers), within)
    console.print(table)
    counts = result["protected_runs"]
    console.print(
        f"protected runs: {counts['false_alarms']} false alarms and {counts['missed']} missed in "
        f"{counts['checks']} checks"
    )
