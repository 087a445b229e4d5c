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
from benchmarks.curvature.peers import PEERS, Operator, PeerMissingError, Problem, version
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
    names = [name for name, _ in _jobs(None)]
    found = {name: part for name in names if (part := _read(folder / f"{name}.json"))}
    if len(found) < len(names):
        here = environment()
        origin = Origin(commit=here["commit"], processor=here["processor"])
        with console.status(f"loading {setting.model}"):
            bench = Bench(setting)
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(names), completed=len(found), state="")
            for name, job in _jobs(bench):
                if name not in found:
                    progress.update(bar, description=name, state="")
                    found[name] = _run_part(
                        job, lambda n: progress.update(bar, state=f"{n} model calls")
                    )
                    found[name].origin = origin
                    write(found[name], folder / f"{name}.json")
                    _say(progress.console, name, found[name])
                    progress.advance(bar)
    return _finish(setting, out, {name: found[name] for name in names})


def _jobs(bench: Bench | None) -> Iterator[tuple[str, Callable[[Listener], Part]]]:
    """All parts by name, in order; without a model only the names mean something."""
    eigen = None if bench is None else _Eigen(bench)
    for kind in OPERATORS:
        yield f"{kind}-{OURS}-cold", lambda tell, kind=kind: eigen.cold(kind, OURS, ours, tell)
        yield f"{kind}-{OURS}-warm", lambda tell, kind=kind: eigen.warm(kind, tell)
        for peer in PEERS:
            slug = f"{kind}-{peer.package}"
            if kind in peer.operators:
                yield (
                    slug,
                    lambda tell, kind=kind, peer=peer: eigen.cold(
                        kind, peer.name, theirs(peer), tell
                    ),
                )
            else:
                reason = f"{peer.name} has no {kind} operator"
                yield slug, lambda tell, reason=reason: Part(skipped=reason)
    yield "gram", lambda tell: _with("gram", measure_gram(bench))
    yield "basis-adapters", lambda tell: _with("basis", over_adapters(bench))
    yield "basis-all", lambda tell: _with("basis", over_all_parameters(bench))
    for name in (OURS, f"{OURS}-all-parameters", AIC_PEER.name):
        yield f"aic-{name}", lambda tell, name=name: _with("aic", measure_aic(bench, name))
    yield "memory", lambda tell: Part(details=measure_memory(bench.setting))


class _Eigen:
    """The matrix of the eigenpairs: adapters are trained once, when the first part needs them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._points: list[list[torch.Tensor]] = []

    def cold(self, kind: Operator, name: str, solve: Any, tell: Listener) -> Part:
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


def _run_part(job: Callable[[Listener], Part], tell: Listener) -> Part:
    try:
        return job(tell)
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
