"""A diagnosis as files: ``aic.json`` for programs, ``report.html`` for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from safeopt.diagnostics.diagnosis import Diagnosis
from safeopt.diagnostics.plots import data_uri, layer_plot, spectrum_plot
from safeopt.files import write_json, write_whole

DATA, PAGE = "aic.json", "report.html"

_TONES = {"not shown": "good", "unclear": "warn"}
_TITLES = {
    "tail": "share of the curvature outside the top k directions",
    "effective_rank": "effective rank (Σλ)²/Σλ²",
    "top": "top eigenvalue λ₁",
    "lowest": "k-th eigenvalue λ_k",
    "overlap": "‖Pg‖/‖g‖ of the task's gradient",
    "update_overlap": "‖Pu‖/‖u‖ of Adam's first update",
    "drift": "ε = ‖F^½ P g‖",
    "coupling": "γ = ‖F^½ P H g‖",
}
_CONDITIONS = {
    "low_rank_sensitivity": (
        "Low-rank sensitivity",
        "at most",
        "Share of the safety curvature outside the top k directions. Small: alignment hangs on few "
        "directions of parameter space.",
    ),
    "initial_orthogonality": (
        "Initial orthogonality",
        "at most",
        "Part of the task's gradient inside the safety subspace. Small: the first steps seem "
        "harmless.",
    ),
    "curvature_coupling": (
        "Curvature coupling",
        "more than",
        "How strongly the task's curvature turns the trajectory into the subspace. {share} of "
        "random directions of that length stay below the threshold.",
    ),
}


def write_report(result: Diagnosis, folder: Path, config: dict[str, Any]) -> Path:
    """Write ``aic.json`` and ``report.html`` into a folder, which is made if need be.

    Args:
        result: the diagnosis.
        folder: where to write.
        config: what was diagnosed, kept in the file as it is; ``model`` and ``train`` are named on
            the page.

    Returns:
        The path of the page.
    """
    folder.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link to what is not there
    write_json(folder / DATA, {"config": config, **result.as_json()})
    return write_whole(folder / PAGE, page(result, config))


def page(result: Diagnosis, config: dict[str, Any]) -> str:
    """The HTML page, plots included."""
    environment = Environment(
        loader=PackageLoader("safeopt.diagnostics"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers = [asdict(layer) for layer in result.layers]
    conditions = []
    for condition in result.conditions:
        title, side, meaning = _CONDITIONS[condition.name]
        # Without the second condition alignment moves at once: that is no good news.
        harmful = condition.holds or result.verdict.risk == "at risk at once"
        tone = ("bad" if harmful else "good") if condition.certain else "warn"
        share = f"{100 * result.thresholds.coupling_quantile:.4g}%"
        words = {"title": title, "side": side, "meaning": meaning.format(share=share), "tone": tone}
        conditions.append(asdict(condition) | words)
    evidence = result.evidence
    return environment.get_template("report.html.j2").render(
        config=config,
        verdict=result.verdict,
        tone=_TONES.get(result.verdict.risk, "bad"),
        conditions=conditions,
        figures=asdict(result.figures),
        intervals=result.intervals,
        titles=_TITLES,
        angle=result.angle,
        update_angle=result.update_angle,
        layers=sorted(layers, key=lambda layer: -layer["curvature"]),
        plots={
            "spectrum": data_uri(spectrum_plot(result.eigenvalues, result.rank)),
            "layers": data_uri(layer_plot(layers)),
        },
        examples=len(evidence.safety_losses),
        alignment_loss=float(evidence.safety_losses.mean()),
        batches=len(evidence.task_losses),
        task_loss=float(evidence.weights @ evidence.task_losses),
        parameters=evidence.size,
        rank=result.rank,
        products=evidence.products,
    )
