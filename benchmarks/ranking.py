"""Does `safeopt.diagnose` know beforehand which runs lose most alignment?

Finished runs of AdamW on several tasks at several learning rates are compared with what the
diagnosis of the same start and the same data predicts for them. Only the order is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.config import ConfigError, RunConfig
from benchmarks.models import load, trainable
from benchmarks.records import FILE, read_result
from benchmarks.tasks import batches, material, single_batches
from safeopt import Diagnosis, SafetyProbe, diagnose
from safeopt.diagnostics.lookahead import adam_rise
from safeopt.diagnostics.scaling_law import OnsetForecast, fit_onset
from safeopt.files import write_json

RANKING = "ranking.json"
_BATCHES = 4
# Shares of a run at whose rise the forecast breach is compared with the measured one.
_KNOWN, _BUDGET = 0.5, 0.8


def ranking(folders: Sequence[Path], out: Path, console: Console) -> dict[str, Any]:
    """Diagnose the start of each folder's runs and compare the order of their losses.

    Args:
        folders: results of `python -m benchmarks run`, one a task.
        out: where ``ranking.json`` is written.
        console: for the table.

    Raises:
        ConfigError: if a folder holds no result.
    """
    runs: list[dict[str, Any]] = []
    diagnoses = {}
    for folder in folders:
        result = read_result(folder)
        if result is None or not result.records:
            raise ConfigError(f"{folder / FILE}: no finished run there")
        config = result.run_config()
        with console.status(f"diagnosing {config.task.name}"):
            diagnosis = diagnosed(config)
        diagnoses[config.task.name] = diagnosis.as_json()
        for record in result.records:
            measured = record.alignment_loss.end - record.alignment_loss.start
            curve = [(point.step, point.alignment_loss) for point in record.curve]
            runs.append(
                {
                    "task": config.task.name,
                    "learning_rate": record.learning_rate,
                    "steps": record.steps,
                    "measured_rise": measured,
                    "predicted": predictions(diagnosis, record.learning_rate, record.steps),
                    "curve": curve,
                    "onset": onset(curve),
                    "calibration": calibration(curve),
                }
            )
    summary = {
        "runs": runs,
        "rank_correlation": correlations(runs),
        "diagnoses": diagnoses,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RANKING, summary)
    _show(summary, console)
    return summary


def diagnosed(config: RunConfig) -> Diagnosis:
    """The diagnosis of a config's start: same model, adapters, data and batch size."""
    model, tokenizer = load(config.model)
    data, seed = material(config, tokenizer), config.seeds[0]
    device = next(model.parameters()).device
    with trainable(model, config.lora, seed) as (adapted, params):
        probe = SafetyProbe(adapted, single_batches(data.safety, seed, device))
        task = list(batches(data.train, config.batch_size, _BATCHES, seed, data.pad, device))
        return diagnose(probe, task, params=params, seed=seed)


def predictions(diagnosis: Diagnosis, learning_rate: float, steps: int) -> dict[str, float]:
    """What the diagnosis foretells for a run, and what the learning rate alone does."""
    figures = diagnosis.figures
    law = OnsetForecast(figures.coupling, figures.drift, learning_rate)
    return {
        "learning_rate": learning_rate,
        "onset_law": law.rise(steps),
        "coupling_alone": OnsetForecast(figures.coupling, 0.0, learning_rate).rise(steps),
        "adam_lookahead": adam_rise(diagnosis.evidence, learning_rate, steps),
    }


def correlations(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation of predicted and measured rises: over all runs, and within.

    ``all`` mixes tasks and rates; ``tasks`` is the mean over the learning rates of the correlation
    among the tasks at that rate, ``rates`` the mean over the tasks of that among the rates. None
    where all predictions are equal.
    """
    table: dict[str, dict[str, float | None]] = {}
    for name in runs[0]["predicted"]:
        table[name] = {"all": _spearman(runs, name)}
        for key, within in (("tasks", "learning_rate"), ("rates", "task")):
            groups = [
                [run for run in runs if run[within] == value]
                for value in dict.fromkeys(run[within] for run in runs)
            ]
            known = [_spearman(group, name) for group in groups if len(group) > 1]
            found = [value for value in known if value is not None]
            table[name][key] = sum(found) / len(found) if found else None
    return table


def onset(curve: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """The fit of a whole run's rise; None where too few points have risen, or one is no number."""
    try:
        return fit_onset(*zip(*curve, strict=True)).as_json()
    except ValueError:
        return None


def calibration(curve: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """Forecast when a loss is reached from the first half of a run, and when it was.

    The budget is the rise that the run reached after 80% of its steps. None where there is no rise.
    """
    steps = [step for step, _ in curve]
    start, budget = curve[0][1], curve[round(_BUDGET * (len(curve) - 1))][1] - curve[0][1]
    if budget <= 0:
        return None
    reached = next(step for step, loss in curve if loss - start >= budget)
    known = [point for point in curve if point[0] <= _KNOWN * steps[-1]]
    try:
        fit = fit_onset(*zip(*known, strict=True))
    except ValueError:  # too few points had risen, or one is no number
        return None
    forecasts = {}
    for model in dict.fromkeys(("power", fit.best)):
        breach = fit.forecast_breach(budget, model)
        forecasts[model] = {
            "step": breach.step,
            "interval": list(breach.interval),
            "covered": breach.interval[0] <= reached <= breach.interval[1],
        }
    return {"budget": budget, "reached": reached, "known_until": known[-1][0]} | forecasts


def _spearman(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    left = _ranks([run["predicted"][name] for run in runs])
    right = _ranks([run["measured_rise"] for run in runs])
    middle = (len(runs) + 1) / 2
    product = sum((a - middle) * (b - middle) for a, b in zip(left, right, strict=True))
    lengths = [sum((x - middle) ** 2 for x in ranks) for ranks in (left, right)]
    return product / (lengths[0] * lengths[1]) ** 0.5 if all(lengths) else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def _show(summary: Mapping[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    names = list(summary["runs"][0]["predicted"])
    for name in ("task", "learning rate", "measured", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "task" else "right")
    for run in summary["runs"]:
        table.add_row(
            run["task"], f"{run['learning_rate']:g}", f"{run['measured_rise']:.3f}",
            *(f"{run['predicted'][name]:.3g}" for name in names),
        )  # fmt: skip
    titles = {"all": "rank correlation", "tasks": "among tasks", "rates": "among rates"}
    for key, title in titles.items():
        values = [summary["rank_correlation"][name][key] for name in names]
        table.add_row(title, "", "", *("none" if v is None else f"{v:+.2f}" for v in values))
    console.print(table)
