"""Runs the parts of the curvature benchmark one after the other in one process.

Each part's figures are kept in ``OUT/parts/NAME.json``, so that a run that was stopped goes on with
what is left. ``OUT/result.json`` and ``OUT/details.json`` are written at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.config import ConfigError
from benchmarks.curvature.aic import AIC_PEER, measure_aic
from benchmarks.curvature.eigenpairs import OURS, WarmStart, measure, ours, theirs
from benchmarks.curvature.gram import measure_gram
from benchmarks.curvature.memory import measure_memory
from benchmarks.curvature.peers import (
    PEERS,
    Operator,
    PeerMissingError,
    Problem,
    Solver,
    version,
)
from benchmarks.curvature.problem import Bench, Setting, adamw_steps
from benchmarks.curvature.records import (
    DETAILS,
    AicRow,
    BasisRow,
    CurvatureResult,
    Details,
    EigenpairsRow,
    GramRow,
    Origin,
    write,
)
from benchmarks.curvature.storage import over_adapters, over_all_parameters
from benchmarks.environment import environment
from benchmarks.records import FILE
from safeopt.files import write_json

PARTS = "parts"
OPERATORS: tuple[Operator, ...] = ("hessian", "ggn")
Listener = Callable[[int], None]


class Part(BaseModel):
    """What one part has found: its rows by the field of the result, the rest, and its origin."""

    eigenpairs: list[EigenpairsRow] = []
    gram: GramRow | None = None
    basis: list[BasisRow] = []
    aic: list[AicRow] = []
    details: dict[str, Any] = {}
    skipped: str | None = None
    origin: Origin | None = None


def run(setting: Setting, out: Path, console: Console) -> CurvatureResult:
    """Run what is not there yet and write the result.

    Args:
        setting: the sizes.
        out: folder of the result.
        console: for progress.

    Raises:
        ConfigError: if the folder holds parts of another setting.
    """
    folder = out / PARTS
    _claim(folder, setting)
    jobs = _jobs()
    found = {name: part for name in jobs if (part := _read(folder / f"{name}.json"))}
    if len(found) < len(jobs):
        here = environment()
        origin = Origin(commit=here["commit"], processor=here["processor"])
        with console.status(f"loading {setting.model}"):
            eigen = _Eigen(Bench(setting))
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(jobs), completed=len(found), state="")
            for name, job in jobs.items():
                if name not in found:
                    progress.update(bar, description=name, state="")
                    found[name] = _run_part(
                        job, eigen, lambda n: progress.update(bar, state=f"{n} model calls")
                    )
                    found[name].origin = origin
                    write(found[name], folder / f"{name}.json")
                    _say(progress.console, name, found[name])
                    progress.advance(bar)
    return _finish(setting, out, {name: found[name] for name in jobs})


def _jobs() -> dict[str, Job]:
    """All parts by name, in order."""
    jobs: dict[str, Job] = {}
    for kind in OPERATORS:
        jobs[f"{kind}-{OURS}-cold"] = _cold(kind, OURS, ours)
        jobs[f"{kind}-{OURS}-warm"] = _warm(kind)
        for peer in PEERS:
            jobs[f"{kind}-{peer.package}"] = (
                _cold(kind, peer.name, theirs(peer))
                if kind in peer.operators
                else _skipped(f"{peer.name} has no {kind} operator")
            )
    jobs["gram"] = lambda eigen, tell: _with("gram", measure_gram(eigen.bench))
    jobs["basis-adapters"] = lambda eigen, tell: _with("basis", over_adapters(eigen.bench))
    jobs["basis-all"] = lambda eigen, tell: _with("basis", over_all_parameters(eigen.bench))
    for name in (OURS, f"{OURS}-all-parameters", AIC_PEER.name):
        jobs[f"aic-{name}"] = _aic(name)
    jobs["memory"] = lambda eigen, tell: Part(details=measure_memory(eigen.bench.setting))
    return jobs


def _cold(kind: Operator, name: str, solve: Solver) -> Job:
    return lambda eigen, tell: eigen.cold(kind, name, solve, tell)


def _warm(kind: Operator) -> Job:
    return lambda eigen, tell: eigen.warm(kind, tell)


def _skipped(reason: str) -> Job:
    return lambda eigen, tell: Part(skipped=reason)


def _aic(name: str) -> Job:
    return lambda eigen, tell: _with("aic", measure_aic(eigen.bench, name))


class _Eigen:
    """The matrix of the eigenpairs: adapters are trained once, when the first part needs them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._points: list[list[torch.Tensor]] = []

    def cold(self, kind: Operator, name: str, solve: Solver, tell: Listener) -> Part:
        with self._problem(-1) as problem:
            row, details = measure(name, kind, "cold", problem, solve, tell)
        return Part(eigenpairs=[row], details=details)

    def warm(self, kind: Operator, tell: Listener) -> Part:
        with self._problem(0) as problem:
            start = WarmStart(problem, kind)
        with self._problem(-1) as problem:
            row, details = measure(OURS, kind, "warm", problem, start, tell)
            details["drift"] = start.drift(problem, kind)
        return Part(eigenpairs=[row], details=details)

    @contextmanager
    def _problem(self, point: int) -> Iterator[Problem]:
        setting = self.bench.setting
        with self.bench.wide() as (model, params):
            if not self._points:
                taken = self.bench.task_batches(2 * setting.steps)
                for part in (taken[: setting.steps], taken[setting.steps :]):
                    adamw_steps(model, params, part, setting.learning_rate)
                    self._points.append([p.detach().clone() for p in params])
            with torch.no_grad():
                for p, value in zip(params, self._points[point], strict=True):
                    p.copy_(value)
            batch = self.bench.safety_batch(setting.examples)
            yield Problem(model, params, batch, setting.rank, setting.tolerance)


# Makes a part from the model and the data, and tells the number of model calls.
Job = Callable[[_Eigen, Listener], Part]


def _run_part(job: Job, eigen: _Eigen, tell: Listener) -> Part:
    try:
        return job(eigen, tell)
    except PeerMissingError as error:
        return Part(skipped=str(error))


def _with(field: str, measured: tuple[Any, dict[str, Any]]) -> Part:
    rows, details = measured
    return Part.model_validate({field: rows, "details": details})


def _finish(setting: Setting, out: Path, found: dict[str, Part]) -> CurvatureResult:
    parts = list(found.values())
    result = CurvatureResult(
        eigenpairs=[row for part in parts for row in part.eigenpairs],
        gram=next((part.gram for part in parts if part.gram), None),
        basis=[row for part in parts for row in part.basis],
        aic=[row for part in parts for row in part.aic],
    )
    packages = [peer.package for peer in PEERS] + [AIC_PEER.package, "scipy"]
    details = Details(
        setting=setting.as_json(),
        environment=environment(),
        origins={name: part.origin for name, part in found.items() if part.origin},
        peers={package: version(package) for package in packages},
        parts={name: part.details for name, part in found.items() if part.details},
        skipped={name: part.skipped for name, part in found.items() if part.skipped},
    )
    write(details, out / DETAILS)
    write(result, out / FILE)
    return result


def _claim(folder: Path, setting: Setting) -> None:
    """Note the setting beside the parts, or check that they are of the same."""
    path, now = folder / "setting.json", setting.as_json()
    if path.exists() and json.loads(path.read_text("utf-8")) != now:
        raise ConfigError(
            f"{folder}: holds parts of another setting; remove it or choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def _read(path: Path) -> Part | None:
    return Part.model_validate_json(path.read_text("utf-8")) if path.exists() else None


def _say(console: Console, name: str, part: Part) -> None:
    if part.skipped:
        console.print(f"{name}: skipped, {part.skipped}", soft_wrap=True, style="yellow")
        return
    for row in part.eigenpairs:
        console.print(
            f"{name}: {row.seconds:.1f} s, {row.products} products, largest residual "
            f"{row.max_residual:.1e}, {row.peak_bytes / 1e6:.0f} MB",
            soft_wrap=True,
        )
    if not part.eigenpairs:
        console.print(f"{name}: done")


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("part {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield progress
